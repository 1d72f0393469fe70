"""One PPO update from rollouts.

The stages of an iteration (Ziegler et al. 2019, arXiv:1909.08593; Schulman et al. 2017,
arXiv:1707.06347):
  1. rollouts: sample answers, score them under every role                    (rollout.py)
  2. rewards: KL penalty per token, the score on the last token            (advantages.py)
  3. advantages: GAE inside the answers, or against other answers          (advantages.py)
  4. updates: a few epochs of clipped policy and value steps                        (here)
  5. the KL coefficient moves towards its target                           (kl_control.py)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from dschat.data.collators import PromptBatch
from dschat.functional.losses import kl_loss, mean_scale, policy_loss, value_loss
from dschat.functional.returns import kl_k3
from dschat.rlhf.advantages import whitened, with_advantages
from dschat.rlhf.experience import Experience, minibatches
from dschat.rlhf.kl_control import KLController
from dschat.rlhf.logprobs import AnswerScores, answer_logprobs
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.ppo_statistics import (
    StepMeans,
    advantage_statistics,
    answer_count,
    rollout_statistics,
    value_statistics,
)
from dschat.rlhf.ptx import PTX
from dschat.rlhf.rewards import Rewards, score_statistics
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout import answer_values, make_experience
from dschat.rlhf.rollout_engine import RolloutEngine, TransformersRollout
from dschat.train.engine import accumulation_groups, backward
from dschat.utils.distributed import all_reduce_sum


class DeepSpeedPPOTrainer:
    """Runs PPO over the roles of a `DeepSpeedRLHFEngine`.

    `engine` samples the answers; by default transformers does, on the actor. `rewards` makes their
    scores; by default those of the reward model as they are. `ptx` is mixed into the actor's steps.
    """

    def __init__(
        self,
        roles: DeepSpeedRLHFEngine,
        config: PPOConfig,
        world_size: int,
        engine: RolloutEngine | None = None,
        rewards: Rewards | None = None,
        ptx: PTX | None = None,
    ):
        self.roles, self.config, self.world_size = roles, config, world_size
        self.engine, self.rewards, self.ptx = engine, rewards or Rewards(), ptx
        self.generator = torch.Generator().manual_seed(config.seed)
        horizon = {} if config.kl_horizon is None else {"horizon": config.kl_horizon}
        self.kl = KLController(config.kl_coefficient, config.kl_target, **horizon)
        self.iterations = 0  # updates made

    per_rank = True  # its state is a few numbers

    def state_dict(self) -> dict[str, object]:
        """Where mini-batches, KL coefficient and warm-up stand; all else is the roles'."""
        return {
            "generator": self.generator.get_state(),
            "kl": self.kl.state_dict(),
            "iterations": self.iterations,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from there."""
        self.generator.set_state(state["generator"])
        self.kl.load_state_dict(state["kl"])
        self.iterations = state["iterations"]

    def rollout(
        self, batches: list[PromptBatch], answers_per_prompt: int | None = None
    ) -> list[Experience]:
        """Stage 1: sample and score batches of prompts, one experience for each.

        Args:
            answers_per_prompt: None for the configured number.
        """
        roles, answers = self.roles, answers_per_prompt or self.config.answers_per_prompt
        engine = self.engine or TransformersRollout(
            roles.actor, roles.tokenizer, roles.generates_in_step
        )
        sampled = make_experience(roles, engine, batches, self.config.rollout(answers))
        return [self.rewards.applied(e, roles.tokenizer, roles.has_reward_model) for e in sampled]

    def evaluate(self, batches: Iterable[PromptBatch]) -> dict[str, float]:
        """What the present policy earns by one answer to each held-out prompt; no update."""
        return self.earned(self.rollout(list(batches), answers_per_prompt=1))

    def earned(self, experiences: list[Experience]) -> dict[str, float]:
        """Figures of what was sampled, before anything is learnt from it."""
        scores = score_statistics(experiences, self.config.reward_clip)
        return rollout_statistics(experiences) | scores

    def train_rlhf(self, experiences: list[Experience]) -> dict[str, float]:
        """Stages 2 to 5: update actor and critic; returns this iteration's statistics."""
        stats = self.earned(experiences) | {"kl_coefficient": self.kl.coefficient}
        learned = with_advantages(experiences, self.config, self.kl.coefficient)
        stats |= advantage_statistics(learned)
        if self.roles.critic is not None:
            stats |= value_statistics(learned)
        if self.config.whitens:
            learned = whitened(learned, all_reduce_sum)
        stats |= self.update(learned)
        if not self.warming_up:  # else the policy is the reference still
            self.kl.update(stats["kl"], answer_count(experiences))
        self.iterations += 1
        return stats

    @property
    def warming_up(self) -> bool:
        """Whether the critic alone trains."""
        return self.iterations < self.config.critic_warmup_iterations

    def update(self, experiences: list[Experience]) -> dict[str, float]:
        """Stage 4: the steps of all epochs; means of what they saw.

        The actor rests in the critic's warm-up, and from the first window on which the policy has
        gone beyond `update_kl_limit`; the critic takes all its steps.
        """
        self.roles.train()
        actor, critic = StepMeans("actor"), StepMeans("critic")
        trains_actor, steps, made, distances = not self.warming_up, 0, 0, []
        for window in self.windows(experiences):
            if trains_actor and made and self.config.update_kl_limit:
                distances.append(self.distance(window))
                trains_actor = distances[-1] <= self.config.update_kl_limit
            scale = self.scale_of(window)
            if trains_actor:
                self.actor_step(window, scale, actor)
                made += 1
            elif not self.warming_up:
                # A schedule over the run's steps: those left out pass as well.
                self.roles.actor.lr_scheduler.step()
            if self.roles.critic is not None:
                self.critic_step(window, scale, critic)
            steps += 1
        shares = {"actor_updates": made / steps}
        if distances:
            shares["update_kl"] = distances[-1]
        if self.ptx is not None:
            shares |= self.ptx.statistics()
        return actor.means() | critic.means() | shares

    def windows(self, experiences: list[Experience]) -> Iterator[list[Experience]]:
        """The mini-batches of each optimizer step, shuffled anew in every epoch."""
        for _ in range(self.config.ppo_epochs):
            shuffled = minibatches(experiences, self.config.micro_batch_size, self.generator)
            yield from accumulation_groups(shuffled, self.config.gradient_accumulation_steps)

    def scale_of(self, window: list[Experience]) -> float:
        """What makes this rank's sums its part of the mean over the window's tokens on all."""
        tokens = all_reduce_sum([float(sum(e.answer_mask.sum().item() for e in window))])[0]
        return mean_scale(tokens, self.world_size)

    @torch.no_grad()
    def distance(self, window: list[Experience]) -> float:
        """KL(sampling policy, present one): k3, mean over the window's tokens on all ranks.

        Measured by passes of its own: gradients of a window that then makes no step would have to
        be taken back.
        """
        moved = 0.0
        for e in window:
            now = self.policy_scores(e).logprobs
            moved += kl_k3(e.logprobs, now).where(e.answer_mask, 0.0).sum().item()
        tokens = float(sum(e.answer_mask.sum().item() for e in window))
        moved, tokens = all_reduce_sum([moved, tokens])
        return moved / max(tokens, 1.0)

    def actor_step(self, window: list[Experience], scale: float, means: StepMeans) -> None:
        """One step of the policy over a window."""
        actor = self.roles.actor
        if self.ptx is not None:
            self.ptx.backward(actor, [len(e.scores) for e in window])
        for i, e in enumerate(window):
            loss, sums = self.actor_loss(e)
            backward(actor, loss * scale, last=i == len(window) - 1)
            means.add(sums)
        actor.step()
        if actor.was_step_applied():
            means.add_norm(actor.get_global_grad_norm())
            if self.roles.ema is not None:
                self.roles.ema.update()

    def critic_step(self, window: list[Experience], scale: float, means: StepMeans) -> None:
        """One step of the critic over a window."""
        critic = self.roles.critic
        for i, e in enumerate(window):
            loss, sums = self.critic_loss(e)
            backward(critic, loss * scale, last=i == len(window) - 1)
            means.add(sums)
        critic.step()
        if critic.was_step_applied():
            means.add_norm(critic.get_global_grad_norm())

    def policy_scores(self, e: Experience, with_entropy: bool = False) -> AnswerScores:
        """The present policy's log-probabilities of the answers, as they were sampled."""
        length, temperature = e.answer_mask.shape[1], self.config.sampling.temperature
        return answer_logprobs(
            self.roles.actor,
            e.sequences,
            e.attention_mask,
            length,
            with_entropy=with_entropy,
            temperature=temperature,
        )

    def actor_loss(self, e: Experience) -> tuple[torch.Tensor, dict[str, float]]:
        """The policy's loss of one mini-batch, summed over its tokens, and sums to report."""
        scored = self.policy_scores(e, with_entropy=True)
        logprobs, entropy = scored.logprobs, scored.entropy
        clip = self.config.clip_range
        loss = policy_loss(logprobs, e.logprobs, e.advantages, e.answer_mask, clip)
        if self.config.kl_in_loss:
            loss = loss + self.kl.coefficient * kl_loss(logprobs, e.ref_logprobs, e.answer_mask)
        with torch.no_grad():
            # Outside the mask the two may drift apart without bound: there, a ratio of 1.
            kept = logprobs.where(e.answer_mask, e.logprobs)
            ratio = torch.exp(kept - e.logprobs)
            return loss, {
                "tokens": e.answer_mask.sum().item(),
                "actor_loss": loss.item(),
                "ratio": (ratio * e.answer_mask).sum().item(),
                "clip_fraction": (((ratio - 1).abs() > clip) & e.answer_mask).sum().item(),
                "approx_kl": kl_k3(e.logprobs, kept).sum().item(),
                "entropy": entropy.where(e.answer_mask, 0.0).sum().item(),
            }

    def critic_loss(self, e: Experience) -> tuple[torch.Tensor, dict[str, float]]:
        """The value loss of one mini-batch, summed over its tokens, and sums to report."""
        values = answer_values(
            self.roles.critic, e.sequences, e.attention_mask, e.answer_mask.shape[1]
        )
        clip = self.config.value_clip_range
        loss = value_loss(values, e.values, e.returns, e.answer_mask, clip)
        sums = {"tokens": e.answer_mask.sum().item(), "critic_loss": loss.item()}
        if clip:
            beyond = ((values - e.values).abs() > clip) & e.answer_mask
            sums["value_clip_fraction"] = beyond.sum().item()
        return loss, sums
