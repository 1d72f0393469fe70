"""The coefficients of PPO, checked against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from dschat.errors import UserError
from dschat.functional.returns import KL_ESTIMATORS
from dschat.rlhf.generation import SamplingConfig
from dschat.rlhf.rollout import RolloutConfig

ESTIMATORS = ("gae", "rloo", "grpo")
WHITENING = ("auto", "always", "never")


@dataclass(frozen=True)
class PPOConfig:
    """The coefficients of PPO."""

    sampling: SamplingConfig
    advantage_estimator: str = "gae"
    answers_per_prompt: int = 1
    kl_coefficient: float = 0.1
    kl_estimator: str | None = None  # of the penalty in the reward; None: k1
    kl_target: float | None = None  # nats an answer; None: the coefficient is fixed
    kl_horizon: int | None = None  # answers; None: 10,000
    clip_range: float = 0.2
    value_clip_range: float = 0.2  # 0: off
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: str = "auto"
    reward_clip: float = 5.0
    missing_eos_penalty: float = 0.0
    ppo_epochs: int = 1
    critic_warmup_iterations: int = 0
    update_kl_limit: float = 0.0  # nats a token; 0: off
    rollout_batch_size: int = 16
    generation_chunk_size: int = 0  # answers generated at a time; 0: those of one batch
    micro_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    seed: int = 1234

    def __post_init__(self):
        # The messages name the flags that these numbers come from.
        self._check_numbers()
        self._check_kl()
        self._check_estimator()

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened over the global batch; `auto` does so for GAE alone."""
        automatic = self.whiten_advantages == "auto" and self.advantage_estimator == "gae"
        return automatic or self.whiten_advantages == "always"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the penalty is a term of the policy's loss (GRPO), not of the reward."""
        return self.advantage_estimator == "grpo"

    def rollout(self, answers_per_prompt: int) -> RolloutConfig:
        """How rollouts are cut."""
        rows = self.rollout_batch_size * answers_per_prompt
        return RolloutConfig(
            sampling=self.sampling,
            batch_rows=self.rollout_batch_size,
            chunk_rows=self.generation_chunk_size or rows,
            score_rows=self.micro_batch_size,
            answers_per_prompt=answers_per_prompt,
        )

    def _check_numbers(self) -> None:
        above_zero = {"cliprange": self.clip_range, "reward_clip": self.reward_clip}
        for name, value in above_zero.items():
            if not value > 0:  # nor not a number
                raise UserError(f"{name} is {value}: give a number above 0")
        not_negative = {
            "cliprange_value": self.value_clip_range,
            "kl_coef": self.kl_coefficient,
            "missing_eos_penalty": self.missing_eos_penalty,
            "critic_warmup_iterations": self.critic_warmup_iterations,
            "update_kl_limit": self.update_kl_limit,
        }
        for name, value in not_negative.items():
            if not 0 <= value < math.inf:
                raise UserError(f"{name} is {value}: give 0 or more")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a number in [0, 1]")
        at_least_one = {
            "answers_per_prompt": self.answers_per_prompt,
            "ppo_epochs": self.ppo_epochs,
            "per_device_generation_batch_size": self.rollout_batch_size,
            "per_device_training_batch_size": self.micro_batch_size,
        }
        for name, value in at_least_one.items():
            if value < 1:
                raise UserError(f"{name} is {value}: give at least 1")
        if self.generation_chunk_size < 0:
            raise UserError(
                f"generation_chunk_size is {self.generation_chunk_size}: give at least 1, "
                "or 0 for all answers to a batch of prompts"
            )
        choices = {
            "advantage_estimator": ESTIMATORS,
            "kl_estimator": (None, *KL_ESTIMATORS),
            "whiten_advantages": WHITENING,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                known = ", ".join(x for x in known if x)
                raise UserError(f"{name} is {getattr(self, name)}: choose one of {known}")

    def _check_kl(self) -> None:
        if self.kl_target is None:
            if self.kl_horizon is not None:
                raise UserError(
                    f"kl_horizon is {self.kl_horizon}, but kl_coef is fixed: give --kl_target too"
                )
            return
        if not 0 < self.kl_target < math.inf:
            raise UserError(f"kl_target is {self.kl_target}: give nats an answer, above 0")
        if self.kl_coefficient == 0:
            raise UserError("kl_target scales kl_coef, which is 0: give a --kl_coef above 0")
        if self.kl_horizon is not None and self.kl_horizon < 1:
            raise UserError(f"kl_horizon is {self.kl_horizon}: give at least 1 answer")

    def _check_estimator(self) -> None:
        name = self.advantage_estimator
        if name == "gae":
            return
        if self.answers_per_prompt < 2:
            raise UserError(
                f"advantage_estimator {name} compares answers to one prompt, but "
                f"answers_per_prompt is {self.answers_per_prompt}: give 2 or more"
            )
        defaults = {f.name: f.default for f in fields(self)}
        of_the_critic = {
            "gamma": "gamma",
            "lam": "lam",
            "value_clip_range": "cliprange_value",
            "critic_warmup_iterations": "critic_warmup_iterations",
        }
        for field, flag in of_the_critic.items():
            if getattr(self, field) != defaults[field]:
                raise UserError(
                    f"{flag} is {getattr(self, field)}, but advantage_estimator {name} has no "
                    f"critic: drop --{flag}, or use gae"
                )
        if name == "grpo" and self.kl_estimator not in (None, "k3"):
            raise UserError(
                f"kl_estimator is {self.kl_estimator}, but advantage_estimator grpo has no KL in "
                "the reward: its loss takes k3; drop --kl_estimator"
            )
        if name == "grpo" and self.whiten_advantages == "always":
            raise UserError(
                "whiten_advantages is always, but grpo measures advantages in deviations of each "
                "group already: drop --whiten_advantages, or use rloo"
            )
