"""Settings of the roles: the folder of each."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from dschat.errors import UserError
from dschat.rlhf.estimators import ESTIMATORS, Estimator
from dschat.settings import Settings, setting


@dataclass(frozen=True)
class RoleSettings(Settings):
    """Settings of the models of the roles."""

    actor_model_name_or_path: str = setting(
        MISSING, "folder or hub id of the SFT model", may_change=True
    )
    critic_model_name_or_path: str | None = setting(
        None,
        "folder or hub id of the reward model that the critic starts from; with rloo and grpo, "
        "which train no critic, of the reward model",
        may_change=True,
    )
    reward_model_name_or_path: str | None = setting(
        None, "folder or hub id of the reward model (default: the critic's)", may_change=True
    )
    init_head_randomly: bool = setting(
        False, "the critic is a language model and gets a random value head"
    )
    share_trunk: str = setting(
        "auto",
        "with LoRA: auto keeps two trunks for four roles, all keeps one (reward model and actor "
        "on one base), none keeps frozen copies",
        choices=("auto", "all", "none"),
    )
    offload_reference_model: bool = setting(False, "keep the reference's weights on the CPU")
    offload_reward_model: bool = setting(False, "keep the reward model's weights on the CPU")

    def names(self, estimator: Estimator, *, has_reward_function: bool) -> RoleNames:
        """Decide the folder of each role.

        Raises:
            UserError: a role without a model, or a setting without effect.
        """
        critic, reward = self.critic_model_name_or_path, self.reward_model_name_or_path
        if estimator.needs_critic and critic is None:
            others = [e.name for e in ESTIMATORS.values() if not e.needs_critic]
            raise UserError(
                "critic_model_name_or_path is required with advantage_estimator "
                f"{estimator.name}; {' and '.join(others)} train no critic"
            )
        if self.init_head_randomly and not estimator.needs_critic:
            raise UserError(
                f"init_head_randomly: advantage_estimator {estimator.name} trains no critic; drop "
                "init_head_randomly"
            )
        if reward is None and not self.init_head_randomly:
            reward = critic
        if reward is None and not has_reward_function:
            cause = "init_head_randomly" if self.init_head_randomly else estimator.name
            raise UserError(
                f"{cause}: nothing gives rewards; add reward_model_name_or_path REWARD_MODEL or "
                "reward_function MODULE:NAME"
            )
        if not estimator.needs_critic and critic not in (None, reward):
            raise UserError(
                f"critic_model_name_or_path {critic}: advantage_estimator {estimator.name} trains "
                f"no critic, and {reward} gives the rewards; drop one of the two"
            )
        return RoleNames(
            self.actor_model_name_or_path,
            critic if estimator.needs_critic else None,
            reward,
            self.init_head_randomly,
            self.share_trunk,
        )


@dataclass(frozen=True)
class RoleNames:
    """Folder or hub id of each role; None as in `RoleSetup`."""

    actor: str
    critic: str | None
    reward: str | None
    fresh_head: bool = False
    share_trunk: str = "auto"
