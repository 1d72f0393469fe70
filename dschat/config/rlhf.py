"""The settings of step 3."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from dschat.config.data import check_streaming
from dschat.config.mixin import MixInArguments
from dschat.config.rewards import RewardArguments
from dschat.config.roles import RoleArguments
from dschat.config.rollout import RolloutArguments
from dschat.config.stability import StabilityArguments
from dschat.config.unused import unused_flags
from dschat.data.config import DataConfig
from dschat.errors import UserError
from dschat.models.reward_statistics import RewardStatistics, read_value_scaling
from dschat.rlhf.generation import SamplingConfig
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.ppo_log import AnswerPrinting
from dschat.rlhf.retokenise import Retokeniser
from dschat.rlhf.role_config import Cast, FrozenConfig, RoleConfig, RoleNames
from dschat.settings import Settings, group, setting
from dschat.train.engine import num_accumulation_groups
from dschat.train.run_config import ModelConfig, RunConfig
from dschat.utils.distributed import launched_rank, print_rank_0


@dataclass(frozen=True)
class PPOArguments(Settings):
    """Flags of the PPO loop."""

    actor_model_name_or_path: str = setting(
        MISSING, "folder or hub id of the SFT model", may_change=True
    )
    critic_model_name_or_path: str | None = setting(
        None,
        "folder or hub id of the reward model that the critic starts from; with rloo and grpo, "
        "which train no critic, of the reward model",
        may_change=True,
    )
    per_device_generation_batch_size: int = setting(16, "prompts per device and rollout")
    per_device_training_batch_size: int = setting(16, "rows per device and training micro-batch")
    generation_batches: int = setting(1, "rollouts between updates")
    ppo_epochs: int = setting(1, "passes over each set of rollouts")
    advantage_estimator: str = setting(
        "gae",
        "gae learns from a critic; rloo and grpo compare answers to one prompt",
        choices=("gae", "rloo", "grpo"),
    )
    max_prompt_seq_len: int = setting(256, "tokens of a prompt; longer ones lose their beginning")
    max_answer_seq_len: int = setting(256, "tokens of an answer")
    temperature: float = setting(1.0, "sampling temperature")
    top_p: float = setting(1.0, "nucleus sampling")
    top_k: int = setting(0, "top-k sampling; 0 is off")
    kl_coef: float = setting(0.1, "KL penalty per token")
    cliprange: float = setting(0.2, "clip range of the policy ratio")
    cliprange_value: float = setting(0.2, "clip range of the values; 0 is off")
    gamma: float = setting(1.0, "discount")
    lam: float = setting(0.95, "GAE's lambda")
    reward_clip: float = setting(5.0, "scores are clipped to this magnitude")
    missing_eos_penalty: float = setting(0.0, "taken from the score of an answer without end")
    eval_interval: int = setting(0, "updates between evaluations; 0: per epoch only")
    max_steps: int = setting(0, "stop after so many updates; 0: after the data")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("generation_batches", "max_prompt_seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")
        for name, meaning in {"max_steps": "no limit", "eval_interval": "once an epoch"}.items():
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: give 0 ({meaning}) or more")


@dataclass(frozen=True)
class RLHFSettings(Settings):
    """Step 3, PPO."""

    ppo: PPOArguments = group(PPOArguments)
    stability: StabilityArguments = group(StabilityArguments)
    rollout: RolloutArguments = group(RolloutArguments)
    sources: RoleArguments = group(RoleArguments)
    rewards: RewardArguments = group(RewardArguments)
    mixin: MixInArguments = group(MixInArguments)
    data: DataConfig = group(DataConfig, max_eval_samples=128)
    actor: ModelConfig = group(ModelConfig, prefix="actor_", optimizer={"full_rate": 9.65e-6})
    critic: ModelConfig = group(ModelConfig, prefix="critic_", optimizer={"full_rate": 5e-6})
    run: RunConfig = group(
        RunConfig,
        num_warmup_steps=100,
        log={"tensorboard_path": "step3_tensorboard", "log_every": 1},
    )
    offload_reference_model: bool = setting(False, "keep the reference's weights on the CPU")
    offload_reward_model: bool = setting(False, "keep the reward model's weights on the CPU")
    enable_ema: bool = setting(False, "keep a moving average of the actor, saved beside it")
    ema_decay: float = setting(0.992, "decay of the moving average")
    print_answers: bool = setting(
        False,
        "print a table of sampled answers, and keep them in answers.jsonl",
        may_change=True,
    )
    print_answers_interval: int = setting(1, "updates between such tables", may_change=True)
    enable_test_mode: bool = setting(False, "stop after --test_stop_step updates")
    test_stop_step: int = setting(0, "updates before a test run stops")
    enable_mixed_precision_lora: bool = setting(
        False, "ZeRO-3 keeps its own precision", retired=True
    )
    align_overflow: bool = setting(False, "each engine skips its own overflows", retired=True)
    num_padding_at_beginning: int = setting(1, "masks come from lengths", retired=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_streaming(self.data, self.run, self.ppo.max_steps)
        if self.print_answers_interval < 1:
            raise UserError(
                f"print_answers_interval is {self.print_answers_interval}: give at least 1; "
                "without --print_answers nothing is printed"
            )
        if self.test_stop_step < 0:
            raise UserError(f"test_stop_step is {self.test_stop_step}: give 0 (never) or more")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}: give a number in [0, 1)")
        # What they are made of is checked as well, before the data is read.
        self.ppo_config()
        self.rollout.fuses(self.actor)
        cast = self.cast("fp32", iterations=1)
        trained = {"actor": self.actor, **({"critic": self.critic} if cast.critic else {})}
        sharded_reward = cast.reward is not None and cast.reward.zero_stage == 3
        self.sources.check_layout(
            trained, train_base=self.run.train_base_model, sharded_reward=sharded_reward
        )
        for line in unused_flags(self, cast, trained):
            print_rank_0(line, launched_rank())

    @property
    def max_seq_len(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.ppo.max_prompt_seq_len + self.ppo.max_answer_seq_len

    def ppo_config(self) -> PPOConfig:
        """The coefficients of PPO."""
        ppo, rollout = self.ppo, self.rollout
        return PPOConfig(
            advantage_estimator=ppo.advantage_estimator,
            sampling=SamplingConfig(
                max_new_tokens=ppo.max_answer_seq_len,
                temperature=ppo.temperature,
                top_p=ppo.top_p,
                top_k=ppo.top_k,
                min_new_tokens=rollout.min_answer_seq_len,
                stop_strings=tuple(rollout.stop_strings),
            ),
            kl_coefficient=ppo.kl_coef,
            clip_range=ppo.cliprange,
            value_clip_range=ppo.cliprange_value,
            gamma=ppo.gamma,
            lam=ppo.lam,
            reward_clip=ppo.reward_clip,
            missing_eos_penalty=ppo.missing_eos_penalty,
            ppo_epochs=ppo.ppo_epochs,
            rollout_batch_size=ppo.per_device_generation_batch_size,
            answers_per_prompt=rollout.answers_per_prompt,
            generation_chunk_size=rollout.generation_chunk_size,
            micro_batch_size=ppo.per_device_training_batch_size,
            gradient_accumulation_steps=self.run.engine.gradient_accumulation_steps,
            seed=self.run.seed,
            **self.stability.coefficients(),
        )

    def iterations(self, batches_per_epoch: int | None) -> int:
        """How many iterations the data, if it is counted, or an earlier stop make."""
        limits = []
        if batches_per_epoch is not None:
            per_epoch = num_accumulation_groups(batches_per_epoch, self.ppo.generation_batches)
            limits.append(self.run.num_train_epochs * per_epoch)
        if self.ppo.max_steps:
            limits.append(self.ppo.max_steps)
        if self.enable_test_mode and self.test_stop_step:
            limits.append(self.test_stop_step)
        iterations, warmup = min(limits), self.stability.critic_warmup_iterations
        if warmup and warmup >= iterations:
            raise UserError(
                f"critic_warmup_iterations is {warmup}, but the run has {iterations} iterations: "
                "the actor would never train; give fewer"
            )
        steps, rising = (iterations - warmup) * self.updates, self.run.num_warmup_steps
        if rising >= steps:
            print_rank_0(
                f"--num_warmup_steps {rising}: the actor makes {steps} steps in all and never "
                "reaches its learning rate; give fewer",
                launched_rank(),
            )
        return iterations

    @property
    def updates(self) -> int:
        """Optimizer steps of each role in a whole iteration."""
        ppo = self.ppo
        rows = ppo.per_device_generation_batch_size * self.rollout.answers_per_prompt
        micro_batches = ppo.generation_batches * num_accumulation_groups(
            rows, ppo.per_device_training_batch_size
        )
        size = self.run.engine.gradient_accumulation_steps
        return ppo.ppo_epochs * num_accumulation_groups(micro_batches, size)

    def role_names(self) -> RoleNames:
        """Which folder plays which role."""
        ppo = self.ppo
        return self.sources.names(
            ppo.actor_model_name_or_path,
            ppo.critic_model_name_or_path,
            ppo.advantage_estimator,
            has_reward_function=self.rewards.reward_function is not None,
        )

    def cast(
        self,
        dtype: str,
        iterations: int,
        retokenise: Retokeniser | None = None,
        scaling: RewardStatistics | None = None,
    ) -> Cast:
        """Every role, with schedules over the optimizer steps of all its iterations."""
        ppo, run, names = self.ppo, self.run, self.role_names()
        # The actor's begins when it does, behind the critic's warm-up.
        acting = max(iterations - self.stability.critic_warmup_iterations, 1)
        micro_batch = ppo.per_device_training_batch_size

        actor = RoleConfig(
            model=names.actor,
            engine=run.engine_config(self.actor, dtype, micro_batch),
            recipe=run.recipe(self.actor),
            schedule=run.schedule(acting * self.updates),
            offload_frozen=self.offload_reference_model,
        )
        reward = critic = None
        if names.critic is not None:
            critic = RoleConfig(
                model=names.critic,
                engine=run.engine_config(self.critic, dtype, micro_batch),
                recipe=run.recipe(self.critic),
                schedule=run.schedule(iterations * self.updates),
                fresh_head=names.fresh_head,
                value_scaling=scaling and read_value_scaling(names.critic),
            )
        if names.reward is not None:
            offload = self.offload_reward_model
            reward = FrozenConfig(names.reward, self.critic.zero_stage, dtype, offload)
        return Cast(
            actor=actor,
            critic=critic,
            reward=reward,
            share_trunk=names.share_trunk,
            retokenise=retokenise,
            scaling=scaling,
        )

    def printing(self) -> AnswerPrinting:
        """How often sampled answers are printed."""
        return AnswerPrinting(self.print_answers_interval if self.print_answers else 0)
