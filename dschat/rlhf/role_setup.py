"""Setup of the roles: the model of each, its training, the sharing of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dschat.errors import UserError
from dschat.train.model_config import ModelConfig
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.schedules import Schedule

if TYPE_CHECKING:
    from dschat.models.reward_statistics import RewardStatistics
    from dschat.rlhf.retokenise import Retokeniser

BASE_CHANGES = "the base would change under the other roles; train adapters alone (LoRA)"
TWO_ENGINES = "two engines cannot shard the same weights; use zero_stage 0, 1 or 2"
MEASURES_WEIGHTS = "it measures weights that the folder's own adapter is part of; drop it"
PACKED_WEIGHTS = "adapters would sit on packed weights that others read; drop it"


@dataclass(frozen=True)
class RoleConfig:
    """One trained role: its model, its engine, how it trains."""

    model: str
    engine: EngineConfig
    config: ModelConfig
    schedule: Schedule
    offload_frozen: bool = False  # the actor's frozen copy lives on the CPU between uses
    fresh_head: bool = False  # the critic starts with a random value head
    value_scaling: RewardStatistics | None = None  # by which the critic's folder was trained


@dataclass(frozen=True)
class FrozenConfig:
    """Role that only scores: its model, and the place of its weights."""

    model: str
    zero_stage: int = 0
    dtype: str = "bf16"
    offload: bool = False  # on the CPU between uses


@dataclass(frozen=True)
class RoleSetup:
    """Roles of a run, checked against each other.

    Attributes:
        critic: None where no critic is trained. reward: None where no model gives rewards.
        share_trunk: `auto`: adapters switched off give reference and reward model; `none`: frozen
            copies; `all`: as `auto`, and one base's weights for every role.
        retokenise: for a reward model that reads other tokens than the actor's.
        scaling: of the reward model's scores; None: they are taken as they are.
        attn_implementation: of all roles; None leaves it to transformers.
    """

    actor: RoleConfig
    critic: RoleConfig | None
    reward: FrozenConfig | None
    share_trunk: str = "auto"
    retokenise: Retokeniser | None = None
    scaling: RewardStatistics | None = None
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.share_trunk == "all":
            self._check_one_trunk()

    @property
    def trained(self) -> dict[str, RoleConfig]:
        """Trained roles by name."""
        roles = {"actor": self.actor, "critic": self.critic}
        return {name: role for name, role in roles.items() if role is not None}

    @property
    def reference(self) -> FrozenConfig:
        """Frozen copy of the actor, unless `reference_is_actors`."""
        engine = self.actor.engine
        offload = self.actor.offload_frozen
        return FrozenConfig(self.actor.model, engine.zero_stage, engine.dtype, offload)

    @property
    def reference_is_actors(self) -> bool:
        """True where the reference is the actor with its adapters off."""
        return self.share_trunk != "none" and self.actor.config.base_is_frozen

    @property
    def reward_is_critics(self) -> bool:
        """True where the reward model is the critic, its adapters off, with its loaded head."""
        if self.critic is None or self.share_trunk == "none":
            return False
        return self._starts_as_reward_model(self.critic) and self.critic.config.base_is_frozen

    @property
    def value_scaling(self) -> RewardStatistics | None:
        """Scaling of the critic's values, so that they start in the units of the rewards."""
        if self.scaling is None or self.critic is None or self.critic.fresh_head:
            return None
        is_reward_model = self._starts_as_reward_model(self.critic)
        return self.scaling if is_reward_model else self.critic.value_scaling

    def _starts_as_reward_model(self, critic: RoleConfig) -> bool:
        if self.reward is None or critic.fresh_head:
            return False
        from dschat.utils.module.model_source import same_model

        return same_model(critic.model, self.reward.model)

    def _check_one_trunk(self) -> None:
        """Refuse a setting that stands in the way of one base's weights for all.

        Raises:
            UserError: naming the setting, with its role in front.
        """
        for name, role in self.trained.items():
            lora = role.config.lora
            for is_obstacle, setting, reason in (
                (lora.lora_dim == 0, f"{name}_lora_dim 0", BASE_CHANGES),
                (role.engine.zero_stage == 3, f"{name}_zero_stage 3", TWO_ENGINES),
                (lora.use_dora, f"{name}_use_dora", MEASURES_WEIGHTS),
                (bool(lora.modules_to_save), f"{name}_modules_to_save", BASE_CHANGES),
                (lora.quantize_base is not None, f"{name}_quantize_base", PACKED_WEIGHTS),
                (role.config.train_base, "train_base_model", BASE_CHANGES),
            ):
                if is_obstacle:
                    raise UserError(f"share_trunk all: {setting}: {reason}")
        if self.reward is not None and self.reward.zero_stage == 3:
            raise UserError(f"share_trunk all: critic_zero_stage 3: {TWO_ENGINES}")
