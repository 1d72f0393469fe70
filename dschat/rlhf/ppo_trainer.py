"""One PPO update from rollouts.

The stages of an iteration (Ziegler et al. 2019, arXiv:1909.08593; Schulman et al. 2017,
arXiv:1707.06347):
  1. rollouts: sample answers, score them under every role                    (rollout.py)
     with dynamic sampling, further ones for prompts that teach nothing (dynamic_sampling.py)
  2. rewards: KL penalty per token, the score on the last token            (advantages.py)
  3. advantages: GAE inside the answers, or against other answers          (estimators.py)
  4. updates: a few epochs of clipped policy and value steps              (ppo_updates.py)
  5. the KL coefficient moves towards its target                           (advantages.py)
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from dschat.data.batches import PromptBatch
from dschat.errors import UserError
from dschat.rlhf.advantages import KLController, whitened, with_advantages
from dschat.rlhf.ahead import RolloutsAhead
from dschat.rlhf.answering import Generated, begin, ready
from dschat.rlhf.dynamic_sampling import Resampled, SparePrompts, resampled
from dschat.rlhf.experience import Experience
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.ppo_health import check_figures
from dschat.rlhf.ppo_statistics import answer_count, learned_statistics, rollout_statistics
from dschat.rlhf.ppo_updates import Updates
from dschat.rlhf.ptx import PTX
from dschat.rlhf.rewards import Rewards
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout import scored
from dschat.rlhf.rollout_engine import RolloutEngine, TransformersRollout
from dschat.train.checkpointer import check_weights
from dschat.utils.distributed import all_reduce_sum, on_every_rank
from dschat.utils.predecessor import changed_class, moved


@changed_class("DeepSpeedPPOTrainer(roles, PPOConfig(...), world_size, seed=1234)")
class DeepSpeedPPOTrainer:
    """Runs PPO over the roles of a `DeepSpeedRLHFEngine`.

    Args:
        engine: samples the answers; by default transformers does, on the actor.
        rewards: makes rewards of scores; by default those of the reward model as they are.
        ptx: language modelling, mixed into the actor's steps.
        spare: further prompts, for dynamic sampling.
        ahead: keeps answers that are sampled while the policy trains.
        seed: of the order of micro-batches.
    """

    per_rank = True  # its state is a few numbers

    def __init__(
        self,
        roles: DeepSpeedRLHFEngine,
        config: PPOConfig,
        world_size: int,
        engine: RolloutEngine | None = None,
        rewards: Rewards | None = None,
        ptx: PTX | None = None,
        spare: SparePrompts | None = None,
        ahead: RolloutsAhead | None = None,
        *,
        seed: int,
    ):
        self.roles = roles
        self.config = config
        self.world_size = world_size
        self.engine = engine
        self.rewards = rewards or Rewards()
        self.ptx = ptx
        self.spare = spare
        self.ahead = ahead
        self.generator = torch.Generator().manual_seed(seed)
        self.kl = KLController(config)
        self.iterations = 0  # finished ones

    def state_dict(self) -> dict[str, Any]:
        """State of the micro-batch order, the KL coefficient and the critic's warm-up."""
        return {
            "generator": self.generator.get_state(),
            "kl": self.kl.state_dict(),
            "iterations": self.iterations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.generator.set_state(state["generator"])
        self.kl.load_state_dict(state["kl"])
        self.iterations = state["iterations"]
        self._weights_changed()  # a resumed run has loaded others

    def rollout(
        self,
        batches: list[PromptBatch],
        answers_per_prompt: int | None = None,
        coming: list[PromptBatch] | None = None,
    ) -> list[Experience]:
        """Stage 1: sample and score batches of prompts, one experience for each.

        Args:
            answers_per_prompt: None for the configured number.
            coming: the next batches, whose answers are to be sampled ahead, by the policy before
                this iteration's update.
        """
        roles, answers = self.roles, answers_per_prompt or self.config.answers_per_prompt
        engine = self.engine or TransformersRollout(roles.actor, roles.tokenizer, roles.synced_gpus)
        is_update = answers_per_prompt is None and self.spare is None
        beginning = functools.partial(begin, roles, engine, config=self.config)
        start, pending = time.perf_counter(), None
        if self.ahead is not None and answers_per_prompt is None:
            pending = self.ahead.take(lambda: ready(batches, self.config, answers, roles.device))
        if pending is None:
            pending = beginning(batches, answers_per_prompt=answers, updates=self.iterations)
        generated = pending.wait() if self.ahead is None else on_every_rank(pending.wait)
        if self.ahead is not None and coming is not None:
            updates = self.iterations
            self.ahead.put(
                beginning(coming, answers_per_prompt=answers, updates=updates, ahead=True)
            )
        seconds = time.perf_counter() - start
        first, *others = scored(
            roles,
            pending.batches,
            generated,
            self.config,
            answers,
            generator=self.generator if is_update else None,
            from_sampler=is_update and self.tells_enough(generated, len(batches)),
            keeps_pass=is_update and self.config.first_pass_is_last(len(batches)),
        )
        late = self.iterations - pending.updates
        first = replace(first, generation_seconds=seconds, staleness=late)
        if self.config.rollout_importance_cap and first.sampler_logprobs is None:
            raise UserError(
                f"rollout_importance_cap: {type(engine).__name__} does not tell the "
                "log-probabilities that it samples by; drop rollout_importance_cap"
            )
        return [self.rewards.applied(e, roles.tokenizer) for e in (first, *others)]

    def tells_enough(self, generated: Generated, batches: int) -> bool:
        """Return whether the engine's log-probabilities can stand for the policy's in an update.

        They can where they are the same but for rounding in fp32. Others can, unless they enter the
        reward, where one step is made: its ratio is 1 by construction, and no other needs them.
        """
        if generated.logprobs is None or self.config.rollout_importance_cap:
            return False  # the cap compares both
        accumulated = self.roles.actor.gradient_accumulation_steps()
        makes_one_step = self.config.first_ratio_is_last(batches, accumulated)
        return generated.exact or (makes_one_step and self.config.estimator.kl_in_loss)

    def resampled(self, rollouts: list[Experience]) -> Resampled:
        """Replace prompts whose rewards have no spread, where dynamic sampling is on."""
        if self.spare is None:
            return Resampled(rollouts, rollouts, {})
        pad = self.roles.tokenizer.pad_token_id
        return resampled(rollouts, self.spare, self.rollout, self.config, pad)

    def evaluate(self, batches: Iterable[PromptBatch]) -> dict[str, float]:
        """Statistics of answers to held-out prompts by the present policy; no update."""
        return self.evaluated(batches)[0]

    def evaluated(
        self, batches: Iterable[PromptBatch]
    ) -> tuple[dict[str, float], list[Experience]]:
        """Evaluate; return the answers beside their statistics.

        Each round takes one answer to every prompt, and with it the memory that one takes.
        """
        prompts, rounds = list(batches), range(self.config.eval_answers_per_prompt)
        rollouts = [e for _ in rounds for e in self.rollout(prompts, answers_per_prompt=1)]
        return self.earned(rollouts), rollouts

    def earned(self, experiences: list[Experience]) -> dict[str, float]:
        """Statistics of rollouts and their rewards.

        Raises:
            UserError: one of them is not finite.
        """
        statistics = rollout_statistics(experiences) | self.rewards.statistics(experiences)
        check_figures(statistics, self.iterations + 1)
        return statistics

    def train_rlhf(self, experiences: list[Experience]) -> dict[str, float]:
        """Stages 2 to 5: update actor and critic; returns this iteration's statistics."""
        learned, statistics = self.advantages(experiences)
        statistics |= self.update(learned)
        self.control_kl(statistics["kl"], experiences)
        return statistics

    def advantages(
        self, rollouts: list[Experience], trained: list[Experience] | None = None
    ) -> tuple[list[Experience], dict[str, float]]:
        """Stages 2 and 3: rewards of tokens, then advantages, and statistics of both.

        Args:
            trained: what dynamic sampling made of the rollouts, whose own statistics are those of
                the policy and its prompts.
        """
        statistics = self.earned(rollouts) | {"kl_coefficient": self.kl.coefficient}
        if self.ahead is not None:
            statistics["rollout_staleness"] = float(rollouts[0].staleness)
        experiences = rollouts if trained is None else trained
        learned = with_advantages(experiences, self.config, self.kl.coefficient)
        statistics |= learned_statistics(learned, self.config, self.roles.critic is not None)
        if self.config.whitens:
            learned = whitened(learned, all_reduce_sum)
        return learned, statistics

    def control_kl(self, kl: float, experiences: list[Experience]) -> None:
        """Stage 5: end the iteration; the KL coefficient follows the measured KL."""
        if not self.warming_up:  # else the policy is the reference still
            self.kl.update(kl, answer_count(experiences))
        self.iterations += 1

    @property
    def warming_up(self) -> bool:
        """True while the critic alone trains."""
        return self.iterations < self.config.critic_warmup_iterations

    def update(self, experiences: list[Experience]) -> dict[str, float]:
        """Stage 4: the steps of all epochs; returns means over them."""
        statistics = self.updates.made(experiences)
        for name, engine in self.roles.trained.items():
            check_weights(name, engine.module, self.iterations + 1)
        self._weights_changed()
        return statistics

    @property
    def updates(self) -> Updates:
        """What makes the steps of this iteration."""
        return Updates(
            self.roles,
            self.config,
            self.world_size,
            self.generator,
            self.ptx,
            iteration=self.iterations + 1,
            kl_coefficient=self.kl.coefficient,
            trains_actor=not self.warming_up,
        )

    def _weights_changed(self) -> None:
        if self.engine is not None:
            self.engine.weights_changed()


__getattr__ = moved(
    __name__,
    {
        "DeepSpeedPPOTrainerUnsupervised": "DeepSpeedPPOTrainer with a PTX (dschat.rlhf.ptx)",
        "gather_log_probs": "dschat.models.logprobs.answer_logprobs",
        "get_model_norm": "the figure grad_norm of metrics.jsonl",
        "print_all_ranks": "dschat.utils.distributed.print_rank_0",
    },
)
