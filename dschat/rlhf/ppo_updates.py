"""The optimizer steps of one PPO iteration: clipped policy and value steps over a few epochs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dschat.functional.losses import mean_scale
from dschat.functional.returns import kl_k3
from dschat.models.logprobs import AnswerScores, answer_logprobs
from dschat.rlhf.experience import Experience, filled, in_micro_batches
from dschat.rlhf.objectives import Sums, loss_count, policy_objective, value_objective
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.ppo_health import check_figures
from dschat.rlhf.ppo_statistics import StepMeans
from dschat.rlhf.ptx import PTX
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout import answer_values
from dschat.train.engine import Engine, backward
from dschat.train.finite import finite_sum, gradients_of
from dschat.train.steps import accumulation_groups
from dschat.train.transfer import numbers, read_sums
from dschat.utils.distributed import all_reduce_sum


@dataclass(frozen=True)
class Updates:
    """Steps of actor and critic on an iteration's experiences.

    Attributes:
        generator: of the order of micro-batches.
        iteration: its number, for messages. trains_actor: False in the critic's warm-up.
        kl_coefficient: of the KL penalty in the loss, for estimators that have it there.
    """

    roles: DeepSpeedRLHFEngine
    config: PPOConfig
    world_size: int
    generator: torch.Generator
    ptx: PTX | None = None
    iteration: int = 1
    kl_coefficient: float = 0.0
    trains_actor: bool = True

    def made(self, experiences: list[Experience]) -> dict[str, float]:
        """Make the steps of all epochs; return means over them.

        The actor rests in the critic's warm-up, and from the first accumulation group on at which
        the policy has gone beyond `update_kl_limit`; the critic takes all its steps. A group that
        holds filler rows alone, on all ranks, makes no step.
        """
        roles = self.roles.train()
        actor, critic = StepMeans("actor"), StepMeans("critic")
        goes_on, steps, actor_steps, distances = self.trains_actor, 0, 0, []
        for group in self.groups(experiences):
            tokens, losses = self.counted(group)
            if not tokens:
                pass_over(roles.actor if self.trains_actor else None, roles.critic)
                continue
            if goes_on and actor_steps and self.config.update_kl_limit:
                distances.append(self.distance(group, tokens))
                goes_on = distances[-1] <= self.config.update_kl_limit
            # Before the actor's: a pass that was kept for it then makes room.
            if roles.critic is not None:
                self.critic_step(roles.critic, group, mean_scale(tokens, self.world_size), critic)
            if goes_on:
                scale = mean_scale(losses, self.world_size)
                self.actor_step(group, scale, actor, moved=actor_steps > 0)
                actor_steps += 1
            elif self.trains_actor:
                pass_over(roles.actor)
            steps += 1
        shares = {"actor_updates": actor_steps / max(steps, 1)}
        if distances:
            shares["update_kl"] = distances[-1]
        if self.ptx is not None:
            shares |= self.ptx.statistics()
        return actor.means() | critic.means() | shares

    def counted(self, group: list[Experience]) -> tuple[float, float]:
        """Count tokens of the losses, and what the policy's loss is a mean over, on all ranks."""
        here = [e.loss_mask.sum() for e in group], [loss_count(e, self.config) for e in group]
        found = numbers([*here[0], *here[1]])
        tokens, losses = all_reduce_sum([sum(found[: len(group)]), sum(found[len(group) :])])
        return tokens, losses

    def groups(self, experiences: list[Experience]) -> Iterator[list[Experience]]:
        """Yield the micro-batches of each optimizer step, shuffled again in every epoch."""
        size = self.config.per_device_training_batch_size
        accumulated = self.roles.actor.gradient_accumulation_steps()
        for epoch in range(self.config.ppo_epochs):
            shuffled = in_micro_batches(
                experiences, size, accumulated, self.generator, is_first=epoch == 0
            )
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

    def actor_step(
        self, group: list[Experience], scale: float, means: StepMeans, *, moved: bool = False
    ) -> None:
        """Make one step of the policy over an accumulation group; `moved` as `policy_objective`."""
        actor = self.roles.actor
        if self.ptx is not None:
            self.ptx.backward(actor, [len(e) for e in group])
        parts = []
        for i, e in enumerate(group):
            loss, sums = self.actor_loss(e, moved)
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
        loss = f"{role}_loss of iteration {self.iteration}"
        finite_sum(loss, sum(sums[f"{role}_loss"] for sums in found), total, gradients)
        engine.step()
        applied, norm = engine.was_step_applied(), engine.get_global_grad_norm()
        if norm is not None and (applied or not engine.fp16_enabled()):
            check_figures({f"{role}_grad_norm": float(norm)}, self.iteration)
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

    def actor_loss(self, e: Experience, moved: bool = False) -> tuple[torch.Tensor, Sums]:
        """Policy loss of one micro-batch, summed, and sums to report; see `policy_objective`."""
        scored = self.policy_scores(e, with_entropy=True)
        return policy_objective(
            e,
            scored.logprobs,
            filled(scored.entropy),
            self.config,
            self.kl_coefficient,
            moved=moved,
        )

    def critic_loss(self, critic: Engine, e: Experience) -> tuple[torch.Tensor, Sums]:
        """Value loss of one micro-batch, summed over its tokens, and sums to report."""
        values = None if e.kept is None else e.kept.taken(critic)
        if values is None:
            values = answer_values(critic, e.sequences, e.attention_mask, e.answer_mask.shape[1])
        return value_objective(e, values, self.config.cliprange_value)


def pass_over(*engines: Engine | None) -> None:
    """Leave out a step of these engines: their schedules span the run's steps and go on."""
    for engine in engines:
        if engine is not None:
            engine.lr_scheduler.step()
