"""One PPO update from rollouts.

The stages of an iteration (Ziegler et al. 2019, arXiv:1909.08593; Schulman et al. 2017,
arXiv:1707.06347):
  1. rollouts: sample answers, score them under every role                    (rollout.py)
     with dynamic sampling, further ones for prompts that teach nothing (dynamic_sampling.py)
  2. rewards: KL penalty per token, the score on the last token            (advantages.py)
  3. advantages: GAE inside the answers, or against other answers          (estimators.py)
  4. updates: a few epochs of clipped policy and value steps                        (here)
  5. the KL coefficient moves towards its target                           (advantages.py)
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from dschat.data.batches import PromptBatch
from dschat.errors import UserError
from dschat.functional.losses import mean_scale
from dschat.functional.returns import kl_k3
from dschat.models.logprobs import AnswerScores, answer_logprobs
from dschat.rlhf.advantages import KLController, whitened, with_advantages
from dschat.rlhf.ahead import RolloutsAhead
from dschat.rlhf.answering import begin, ready
from dschat.rlhf.dynamic_sampling import Resampled, SparePrompts, resampled
from dschat.rlhf.experience import Experience, filled, minibatches
from dschat.rlhf.objectives import Sums, loss_count, policy_objective, value_objective
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.ppo_health import check_figures
from dschat.rlhf.ppo_statistics import (
    StepMeans,
    advantage_statistics,
    answer_count,
    masked_share,
    rollout_statistics,
    value_statistics,
    zero_spread,
)
from dschat.rlhf.ptx import PTX
from dschat.rlhf.rewards import Rewards
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout import answer_values, scored
from dschat.rlhf.rollout_engine import RolloutEngine, TransformersRollout
from dschat.train.checkpointer import check_weights
from dschat.train.engine import Engine, backward
from dschat.train.finite import finite_sum, gradients_of
from dschat.train.steps import accumulation_groups
from dschat.train.transfer import numbers, read_sums
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
        seed: of the order of mini-batches.
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
        """State of the mini-batch order, the KL coefficient and the critic's warm-up."""
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
        accumulated = roles.actor.gradient_accumulation_steps()
        is_update = answers_per_prompt is None and self.spare is None
        fresh = is_update and self.config.first_ratio_is_last(len(batches), accumulated)
        beginning = functools.partial(begin, roles, engine, config=self.config)
        start, begun = time.perf_counter(), None
        if self.ahead is not None and answers_per_prompt is None:
            begun = self.ahead.take(lambda: ready(batches, self.config, answers, roles.device))
        if begun is None:
            begun = beginning(batches, answers_per_prompt=answers, updates=self.iterations)
        generated = begun.wait() if self.ahead is None else on_every_rank(begun.wait)
        if self.ahead is not None and coming is not None:
            updates = self.iterations
            self.ahead.put(
                beginning(coming, answers_per_prompt=answers, updates=updates, ahead=True)
            )
        seconds = time.perf_counter() - start
        first, *others = scored(roles, begun.batches, generated, self.config, answers, fresh=fresh)
        late = self.iterations - begun.updates
        first = replace(first, generation_seconds=seconds, staleness=late)
        if self.config.rollout_importance_cap and first.sampler_logprobs is None:
            raise UserError(
                f"rollout_importance_cap: {type(engine).__name__} does not tell the "
                "log-probabilities that it samples by; drop rollout_importance_cap"
            )
        return [self.rewards.applied(e, roles.tokenizer) for e in (first, *others)]

    def resampled(self, rollouts: list[Experience]) -> Resampled:
        """Have prompts without spread give way to others, where dynamic sampling is on."""
        if self.spare is None:
            return Resampled(rollouts, rollouts, {})
        pad = self.roles.tokenizer.pad_token_id
        return resampled(rollouts, self.spare, self.rollout, self.config, pad)

    def evaluate(self, batches: Iterable[PromptBatch]) -> dict[str, float]:
        """Statistics of one answer to each held-out prompt by the present policy; no update."""
        return self.evaluated(batches)[0]

    def evaluated(
        self, batches: Iterable[PromptBatch]
    ) -> tuple[dict[str, float], list[Experience]]:
        """Evaluate; return the answers beside their statistics."""
        rollouts = self.rollout(list(batches), answers_per_prompt=1)
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
        statistics |= advantage_statistics(learned)
        if self.config.estimator.min_answers > 1:
            share = zero_spread(experiences, self.config.missing_eos_penalty)
            statistics["frac_reward_zero_std"] = share
        if self.config.policy.mask_truncated_answers:
            statistics["masked"] = masked_share(learned)
        if self.roles.critic is not None:
            statistics |= value_statistics(learned)
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
        """Stage 4: the steps of all epochs; returns means over them.

        The actor rests in the critic's warm-up, and from the first accumulation group on at which
        the policy has gone beyond `update_kl_limit`; the critic takes all its steps. A group that
        holds filler rows alone, on all ranks, makes no step.
        """
        self.roles.train()
        actor, critic = StepMeans("actor"), StepMeans("critic")
        trains_actor, steps, actor_steps, distances = not self.warming_up, 0, 0, []
        for group in self.groups(experiences):
            here = [e.loss_mask.sum() for e in group], [loss_count(e, self.config) for e in group]
            counted = numbers([*here[0], *here[1]])
            tokens, losses = all_reduce_sum(
                [sum(counted[: len(group)]), sum(counted[len(group) :])]
            )
            if not tokens:
                self.pass_over(None if self.warming_up else self.roles.actor, self.roles.critic)
                continue
            if trains_actor and actor_steps and self.config.update_kl_limit:
                distances.append(self.distance(group, tokens))
                trains_actor = distances[-1] <= self.config.update_kl_limit
            # From this rank's sums to the global mean.
            scale = mean_scale(tokens, self.world_size)
            if trains_actor:
                self.actor_step(group, mean_scale(losses, self.world_size), actor)
                actor_steps += 1
            elif not self.warming_up:
                self.pass_over(self.roles.actor)
            if self.roles.critic is not None:
                self.critic_step(self.roles.critic, group, scale, critic)
            steps += 1
        for name, engine in self.roles.trained.items():
            check_weights(name, engine.module, self.iterations + 1)
        self._weights_changed()
        shares = {"actor_updates": actor_steps / max(steps, 1)}
        if distances:
            shares["update_kl"] = distances[-1]
        if self.ptx is not None:
            shares |= self.ptx.statistics()
        return actor.means() | critic.means() | shares

    def _weights_changed(self) -> None:
        if self.engine is not None:
            self.engine.weights_changed()

    @staticmethod
    def pass_over(*engines: Engine | None) -> None:
        """Leave out a step of these engines: their schedules span the run's steps and go on."""
        for engine in engines:
            if engine is not None:
                engine.lr_scheduler.step()

    def groups(self, experiences: list[Experience]) -> Iterator[list[Experience]]:
        """Yield the mini-batches of each optimizer step, shuffled anew in every epoch."""
        size = self.config.per_device_training_batch_size
        accumulated = self.roles.actor.gradient_accumulation_steps()
        for _ in range(self.config.ppo_epochs):
            shuffled = minibatches(experiences, size, accumulated, self.generator)
            yield from accumulation_groups(shuffled, accumulated)

    @torch.no_grad()
    def distance(self, group: list[Experience], tokens: float) -> float:
        """KL(sampling policy, present one): k3, mean over the group's tokens on all ranks.

        Measured by passes of its own: gradients of a group that then makes no step would have to
        be taken back.
        """
        parts = []
        for e in group:
            now = self.policy_scores(e).logprobs
            parts.append(kl_k3(e.logprobs, now).where(e.loss_mask, 0.0).sum())
        (moved,) = all_reduce_sum([sum(numbers(parts))])
        return moved / tokens

    def actor_step(self, group: list[Experience], scale: float, means: StepMeans) -> None:
        """Make one step of the policy over an accumulation group."""
        actor = self.roles.actor
        if self.ptx is not None:
            self.ptx.backward(actor, [len(e) for e in group])
        parts = []
        for i, e in enumerate(group):
            loss, sums = self.actor_loss(e)
            backward(actor, loss * scale, last=i == len(group) - 1)
            parts.append(sums)
        if self.step(actor, "actor", parts, means) and self.roles.ema is not None:
            self.roles.ema.update()

    def critic_step(
        self, critic: Engine, group: list[Experience], scale: float, means: StepMeans
    ) -> None:
        """Make one step of the critic over an accumulation group."""
        parts = []
        for i, e in enumerate(group):
            loss, sums = self.critic_loss(critic, e)
            backward(critic, loss * scale, last=i == len(group) - 1)
            parts.append(sums)
        self.step(critic, "critic", parts, means)

    def step(self, engine: Engine, role: str, parts: list[Sums], means: StepMeans) -> bool:
        """Make an optimizer step; tell whether it changed the weights.

        Args:
            parts: sums of each micro-batch, the loss's among them.

        Raises:
            UserError: on every rank, where the loss, or the norm of the gradients, is not finite.
        """
        gradients = gradients_of(engine.gradients)
        found = read_sums([*parts, *({"gradients": total} for total in gradients.total)])
        total = sum(found.pop()["gradients"] for _ in gradients.total)
        for sums in found:
            means.add(sums)
        loss = f"{role}_loss of iteration {self.iterations + 1}"
        finite_sum(loss, sum(sums[f"{role}_loss"] for sums in found), total, gradients)
        engine.step()
        applied, norm = engine.was_step_applied(), engine.get_global_grad_norm()
        if norm is not None and (applied or not engine.fp16_enabled()):
            check_figures({f"{role}_grad_norm": float(norm)}, self.iterations + 1)
        if applied:
            means.add_norm(norm)
        return applied

    def policy_scores(self, e: Experience, with_entropy: bool = False) -> AnswerScores:
        """Log-probabilities of answers under the present policy at the sampling temperature."""
        length, temperature = e.answer_mask.shape[1], self.config.sampling.temperature
        return answer_logprobs(
            self.roles.actor,
            e.sequences,
            e.attention_mask,
            length,
            with_entropy=with_entropy,
            temperature=temperature,
        )

    def actor_loss(self, e: Experience) -> tuple[torch.Tensor, Sums]:
        """Policy loss of one mini-batch, summed, and sums to report."""
        scored = self.policy_scores(e, with_entropy=True)
        entropy = filled(scored.entropy)
        return policy_objective(e, scored.logprobs, entropy, self.config, self.kl.coefficient)

    def critic_loss(self, critic: Engine, e: Experience) -> tuple[torch.Tensor, Sums]:
        """Value loss of one mini-batch, summed over its tokens, and sums to report."""
        values = answer_values(critic, e.sequences, e.attention_mask, e.answer_mask.shape[1])
        return value_objective(e, values, self.config.cliprange_value)


__getattr__ = moved(
    __name__,
    {
        "DeepSpeedPPOTrainerUnsupervised": "DeepSpeedPPOTrainer with a PTX (dschat.rlhf.ptx)",
        "gather_log_probs": "dschat.models.logprobs.answer_logprobs",
        "get_model_norm": "the figure grad_norm of metrics.jsonl",
        "print_all_ranks": "dschat.utils.distributed.print_rank_0",
    },
)
