"""Settings of a PPO run, and what follows from them: roles, iterations, optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from dschat.data.config import DataConfig
from dschat.errors import UserError
from dschat.rlhf.part_config import EMAConfig, PTXConfig, RewardConfig
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.role_settings import RoleNames, RoleSettings
from dschat.rlhf.role_setup import FrozenConfig, RoleConfig, RoleSetup
from dschat.rlhf.rollout_config import RolloutConfig
from dschat.settings import Settings, group, setting
from dschat.train.model_config import ModelConfig
from dschat.train.run_config import RunConfig
from dschat.train.run_length import RunLength
from dschat.train.steps import num_accumulation_groups

if TYPE_CHECKING:
    from dschat.models.reward_statistics import RewardStatistics
    from dschat.rlhf.retokenise import Retokeniser

WARM_UP = 100  # optimizer steps at most, unless a number is given


@dataclass(frozen=True)
class PPORunSettings(Settings):
    """Settings of a program that trains by PPO.

    Attributes:
        KIND: name of the program. PHASE: number of the step whose rows it reads.
    """

    KIND: ClassVar[str] = "step 3 (PPO)"
    PHASE: ClassVar[int] = 3

    roles: RoleSettings = group(RoleSettings)
    ppo: PPOConfig = group(PPOConfig)
    rewards: RewardConfig = group(RewardConfig)
    ptx: PTXConfig = group(PTXConfig)
    ema: EMAConfig = group(EMAConfig)
    data: DataConfig = group(DataConfig, max_eval_samples=128)
    actor: ModelConfig = group(ModelConfig, prefix="actor_", optimizer={"full_rate": 9.65e-6})
    critic: ModelConfig = group(
        ModelConfig, prefix="critic_", optimizer={"full_rate": 5e-6, "full_rate_size": 3.5e8}
    )
    run: RunConfig = group(
        RunConfig,
        output_dir="./output/ppo",
        num_warmup_steps=None,
        log={"tensorboard_path": "step3_tensorboard", "log_every": 1},
    )
    max_prompt_seq_len: int = setting(
        256, "tokens of a prompt; longer ones lose their beginning", at_least=1
    )
    rollouts: RolloutConfig = group(RolloutConfig)
    eval_interval: int = setting(0, "updates between evaluations; 0: per epoch only", at_least=0)
    max_steps: int = setting(0, "stop after so many updates; 0: after the data", at_least=0)
    print_answers: bool = setting(
        False,
        "print some sampled answers, and keep them in answers.jsonl",
        may_change=True,
    )
    print_answers_interval: int = setting(
        1, "updates between such prints", at_least=1, may_change=True
    )
    enable_test_mode: bool = setting(False, "stop after test_stop_step updates")
    test_stop_step: int = setting(0, "updates before a test run stops", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rollouts.check(self.actor, self.ppo, train_base=self.run.train_base_model)
        self.role_setup("fp32", iterations=1)  # its parts check themselves

    @property
    def max_seq_len(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.max_prompt_seq_len + self.ppo.sampling.max_answer_seq_len

    @property
    def answers_interval(self) -> int:
        """Updates between prints of sampled answers; 0: none."""
        return self.print_answers_interval if self.print_answers else 0

    def iterations(self, batches_per_epoch: int | None) -> int:
        """Number of iterations that the data, if it is counted, or an earlier stop make.

        Raises:
            UserError: the critic's warm-up leaves none to the actor.
        """
        limits = []
        if batches_per_epoch is not None:
            per_epoch = num_accumulation_groups(batches_per_epoch, self.batches_per_iteration)
            limits.append(self.run.num_train_epochs * per_epoch)
        if self.max_steps:
            limits.append(self.max_steps)
        if self.enable_test_mode and self.test_stop_step:
            limits.append(self.test_stop_step)
        iterations, warmup = min(limits), self.ppo.critic_warmup_iterations
        if warmup and warmup >= iterations:
            raise UserError(
                f"critic_warmup_iterations is {warmup}, but the run has {iterations} iterations: "
                "the actor would never train; give fewer"
            )
        return iterations

    @property
    def batches_per_iteration(self) -> int:
        """Batches of prompts of an iteration: as many as fill one accumulation group at least.

        Optimizer steps are made inside an iteration. Where its `generation_batches` have fewer
        micro-batches than `gradient_accumulation_steps` adds up, the next batches of prompts join
        it: no weights change between their rollouts in any case.
        """
        needed = num_accumulation_groups(self._accumulated, self._micro_batches)
        return max(self.ppo.generation_batches, needed)

    @property
    def updates(self) -> int:
        """Optimizer steps of each role in a complete iteration."""
        micro_batches = self.batches_per_iteration * self._micro_batches
        return self.ppo.ppo_epochs * num_accumulation_groups(micro_batches, self._accumulated)

    @property
    def _micro_batches(self) -> int:
        """Micro-batches that the answers to one batch of prompts make."""
        rows = self.ppo.per_device_generation_batch_size * self.ppo.answers_per_prompt
        return num_accumulation_groups(rows, self.ppo.per_device_training_batch_size)

    @property
    def _accumulated(self) -> int:
        return self.run.engine.gradient_accumulation_steps

    def warm_up(self, iterations: int) -> int:
        """Optimizer steps in which the actor's rate rises: by default at most a tenth of them."""
        return self._paced(self.actor_steps(iterations)).warm_up

    def _paced(self, steps: int) -> RunConfig:
        """Choose the warm-up in so many optimizer steps, where none is given."""
        if self.run.num_warmup_steps is not None:
            return self.run
        return replace(self.run, num_warmup_steps=min(WARM_UP, steps // 10))

    def remarks(self, iterations: int) -> Iterator[str]:
        """Yield lines about settings that do something else than they read like."""
        accumulated, asked = self._accumulated, self.ppo.generation_batches
        batches, each = self.batches_per_iteration, self._micro_batches
        if batches > asked:
            yield (
                f"gradient_accumulation_steps {accumulated}: generation_batches {asked} makes "
                f"{asked * each} micro-batches, so each iteration takes {batches} batches of "
                f"prompts; generation_batches {batches} says the same"
            )
        if left := batches * each % accumulated:
            yield (
                f"gradient_accumulation_steps {accumulated}: of the {batches * each} micro-batches "
                f"of an iteration, its last optimizer step adds up {left}"
            )
        if filters := self.ppo.sampling.filters:
            yield (
                f"{', '.join(filters)}: answers come from a part of the distribution that "
                "log-probabilities are of, so the KL of sampled tokens is off and can be negative"
            )
        is_chosen = self.run.num_warmup_steps is None and self.run.lr_scheduler_type != "constant"
        if is_chosen and (warm_up := self.warm_up(iterations)) < WARM_UP:
            yield (
                f"num_warmup_steps {WARM_UP}, the default, is a tenth of a shorter run: {warm_up} "
                f"of the actor's {self.actor_steps(iterations)} optimizer steps"
            )

    def actor_steps(self, iterations: int) -> int:
        """Optimizer steps of the actor in so many iterations, the critic's warm-up left out."""
        return max(iterations - self.ppo.critic_warmup_iterations, 1) * self.updates

    def length(self, iterations: int, batches_per_epoch: int | None) -> RunLength:
        """Length of the actor's run in so many iterations."""
        batches, each, passes = batches_per_epoch, self._micro_batches, self.ppo.ppo_epochs

        def steps(accumulation: int) -> int:
            size = max(self.ppo.generation_batches, num_accumulation_groups(accumulation, each))
            updates = passes * num_accumulation_groups(size * each, accumulation)
            return num_accumulation_groups(batches or 0, size) * updates

        epochs = self.run.num_train_epochs
        of_data = epochs * num_accumulation_groups(batches or 0, self.batches_per_iteration)
        return RunLength(
            epochs=epochs,
            micro_batches=None if batches is None else batches * each,
            accumulation=self._accumulated,
            warm_up=self.warm_up(iterations),
            steps_of_epoch=steps,
            max_steps=iterations if batches is None or iterations < of_data else 0,
            unit=self.updates,
            waiting=self.ppo.critic_warmup_iterations * self.updates,
        )

    def role_names(self) -> RoleNames:
        """Folder of each role."""
        has_function = bool(self.rewards.reward_function)
        return self.roles.names(self.ppo.estimator, has_reward_function=has_function)

    def role_setup(
        self,
        dtype: str,
        iterations: int,
        retokenise: Retokeniser | None = None,
        scaling: RewardStatistics | None = None,
    ) -> RoleSetup:
        """Set up each role, with schedules over the optimizer steps of all its iterations."""
        run, names = self.run, self.role_names()
        micro_batch = self.ppo.per_device_training_batch_size
        actor_steps, steps = self.actor_steps(iterations), iterations * self.updates
        actor = RoleConfig(
            model=names.actor,
            engine=run.engine_config(self.actor, dtype, micro_batch),
            config=run.complete(self.actor),
            schedule=self._paced(actor_steps).schedule(actor_steps),
            offload_frozen=self.roles.offload_reference_model,
        )
        reward = critic = None
        if names.critic is not None:
            critic = RoleConfig(
                model=names.critic,
                engine=run.engine_config(self.critic, dtype, micro_batch),
                config=run.complete(self.critic),
                schedule=self._paced(steps).schedule(steps),
                fresh_head=names.fresh_head,
                value_scaling=scaling and _value_scaling(names.critic),
            )
        if names.reward is not None:
            reward = FrozenConfig(
                names.reward, self.critic.zero_stage, dtype, self.roles.offload_reward_model
            )
        return RoleSetup(
            actor=actor,
            critic=critic,
            reward=reward,
            share_trunk=names.share_trunk,
            retokenise=retokenise,
            scaling=scaling,
            attn_implementation=run.attn_implementation,
        )


def _value_scaling(critic: str) -> RewardStatistics | None:
    from dschat.models.reward_statistics import read_value_scaling

    return read_value_scaling(critic)
