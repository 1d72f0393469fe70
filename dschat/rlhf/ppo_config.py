"""Settings of PPO: rollouts, rewards of tokens, updates."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.errors import UserError
from dschat.functional.returns import KL_ESTIMATORS
from dschat.rlhf.estimators import ESTIMATORS, Estimator
from dschat.rlhf.part_config import SamplingConfig
from dschat.rlhf.policy_config import PolicyConfig
from dschat.settings import Settings, given_flags, group, setting

OF_THE_CRITIC = ("gamma", "lam", "cliprange_value", "critic_warmup_iterations")


@dataclass(frozen=True)
class PPOConfig(Settings):
    """Settings of PPO, checked against each other."""

    sampling: SamplingConfig = group(SamplingConfig)
    per_device_generation_batch_size: int = setting(
        16, "prompts per device and rollout", at_least=1
    )
    generation_batches: int = setting(1, "rollouts between updates", at_least=1)
    answers_per_prompt: int = setting(1, "answers sampled for each prompt", at_least=1)
    eval_answers_per_prompt: int = setting(
        1, "answers sampled for each held-out prompt in an evaluation", at_least=1
    )
    generation_chunk_size: int = setting(
        0,
        "answers that a device generates at a time, of prompts of like length; "
        "0: all answers to as many prompts as per_device_generation_batch_size",
        at_least=0,
    )
    per_device_training_batch_size: int = setting(
        16, "rows per device and training micro-batch", at_least=1
    )
    ppo_epochs: int = setting(1, "passes over each set of rollouts", at_least=1)
    advantage_estimator: str = setting(
        "gae",
        "gae learns from a critic; rloo and grpo compare answers to one prompt",
        choices=tuple(ESTIMATORS),
    )
    kl_coef: float = setting(0.1, "KL penalty per token", at_least=0)
    kl_estimator: str | None = setting(
        None,
        "of the KL penalty in the reward: k1 = log(p/q), k3 = q/p - 1 + log(p/q) (default: k1; "
        "grpo has k3 in its loss instead)",
        choices=tuple(KL_ESTIMATORS),
    )
    kl_target: float | None = setting(
        None, "nats an answer that kl_coef is steered towards (default: kl_coef is fixed)", above=0
    )
    kl_horizon: int = setting(
        10_000, "answers over which kl_target acts in full (default: 10000)", at_least=1
    )
    cliprange: float = setting(0.2, "clip range of the policy ratio", above=0)
    policy: PolicyConfig = group(PolicyConfig)
    cliprange_value: float = setting(0.2, "clip range of the values; 0 is off", at_least=0)
    gamma: float = setting(1.0, "discount", at_least=0, at_most=1)
    lam: float = setting(0.95, "GAE's lambda", at_least=0, at_most=1)
    whiten_advantages: str = setting(
        "auto",
        "to mean 0 and variance 1 over the tokens of an iteration; auto: with gae alone",
        choices=("auto", "always", "never"),
    )
    missing_eos_penalty: float = setting(
        0.0, "taken from the reward of an answer without end token", at_least=0
    )
    critic_warmup_iterations: int = setting(
        0, "first iterations in which the critic alone trains", at_least=0
    )
    update_kl_limit: float = setting(
        0.0,
        "stop the actor's updates of an iteration when its KL to the sampling policy exceeds this "
        "(nats per token); 0 is off",
        at_least=0,
    )

    rollout_importance_cap: float = setting(
        0.0,
        "largest weight of a token by which the policy loss corrects the gap between the rollout "
        "engine's log-probabilities and the policy's; 0 is off",
        at_least=0,
    )
    rollouts_ahead: int = setting(
        0,
        "1: answers to the next prompts are sampled while the policy trains, and so by the policy "
        "before that update; needs rollout_importance_cap",
        choices=(0, 1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_kl()
        self._check_importance()
        self._check_estimator()

    @property
    def estimator(self) -> Estimator:
        """Record of `advantage_estimator`, its advantages measured by `advantage_std`."""
        return ESTIMATORS[self.advantage_estimator].measured(self.policy.advantage_std)

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the policy ratio may go below 1 and above it."""
        high = self.policy.cliprange_high
        return self.cliprange, self.cliprange if high is None else high

    @property
    def whitens(self) -> bool:
        """Return whether advantages are whitened over the global batch."""
        if self.whiten_advantages == "auto":
            return self.estimator.whitens
        return self.whiten_advantages == "always"

    def micro_batches(self, rollouts: int) -> int:
        """Count an epoch's micro-batches on each rank, of so many rollouts."""
        rows = self.per_device_generation_batch_size * self.answers_per_prompt
        return rollouts * -(-rows // self.per_device_training_batch_size)

    def first_ratio_is_last(self, rollouts: int, accumulated: int) -> bool:
        """Return whether an iteration makes one step, whose ratio is 1 by construction.

        Args:
            rollouts: of an iteration, on each rank. accumulated: micro-batches of a step.
        """
        is_single = self.ppo_epochs == 1 and self.micro_batches(rollouts) <= accumulated
        return is_single and not self.rollout_importance_cap

    def first_pass_is_last(self, rollouts: int) -> bool:
        """Return whether an iteration makes one pass over one micro-batch of so many rollouts."""
        return self.ppo_epochs == 1 and self.micro_batches(rollouts) == 1

    def chunk_rows(self, answers_per_prompt: int) -> int:
        """Answers generated at a time, by default those to one batch of prompts."""
        rows = self.per_device_generation_batch_size * answers_per_prompt
        return self.generation_chunk_size or rows

    def _check_kl(self) -> None:
        if self.kl_target is not None and self.kl_coef == 0:
            raise UserError("kl_target scales kl_coef, which is 0: give a kl_coef above 0")
        if self.kl_target is None and "kl_horizon" in {flag.name for flag in given_flags(self)}:
            raise UserError(
                f"kl_horizon is {self.kl_horizon}, but kl_coef is fixed: give kl_target too"
            )

    def _check_importance(self) -> None:
        cap, filters = self.rollout_importance_cap, self.sampling.filters
        if 0 < cap < 1:
            raise UserError(
                f"rollout_importance_cap is {cap}: where engine and policy agree the weight is 1; "
                "give 1 or more, or 0 for none"
            )
        if cap and filters:
            raise UserError(
                f"rollout_importance_cap: with {', '.join(filters)} answers come from a part of "
                "the distribution, which no weight makes whole; drop "
                f"{', '.join(filters)}, or rollout_importance_cap"
            )

        if self.rollouts_ahead and not cap:
            raise UserError(
                "rollouts_ahead: answers come from the policy before the last update; give "
                "rollout_importance_cap, which corrects for it (2 is a common one)"
            )
        if self.rollouts_ahead and self.policy.dynamic_sampling_rounds:
            raise UserError(
                "rollouts_ahead: dynamic_sampling_rounds samples further prompts by another policy "
                "than the first ones; drop one of the two"
            )

    def _check_estimator(self) -> None:
        name, estimator = self.advantage_estimator, self.estimator
        self.policy.check(ESTIMATORS[name], self.missing_eos_penalty)
        if self.answers_per_prompt < estimator.min_answers:
            raise UserError(
                f"advantage_estimator {name} compares answers to one prompt, but "
                f"answers_per_prompt is {self.answers_per_prompt}: give {estimator.min_answers} "
                "or more"
            )
        if not estimator.needs_critic:
            for flag in given_flags(self):
                if flag.name in OF_THE_CRITIC:
                    raise UserError(
                        f"{flag.name} is {flag.value(self)}, but advantage_estimator {name} has no "
                        f"critic: drop {flag.name}, or use gae"
                    )
        if estimator.kl_in_loss and self.kl_estimator not in (None, "k3"):
            raise UserError(
                f"kl_estimator is {self.kl_estimator}, but advantage_estimator {name} has no KL in "
                "the reward: its loss takes k3; drop kl_estimator"
            )
        if estimator.is_normalised and self.whiten_advantages == "always":
            raise UserError(
                f"whiten_advantages is always, but {name} measures advantages in deviations of "
                "each group already: drop whiten_advantages, or use rloo"
            )
