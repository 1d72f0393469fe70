"""Flags of who serves whom in PPO: where rewards come from, what shares whose weights."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.errors import UserError
from dschat.rlhf.role_config import LAYOUTS, RoleNames
from dschat.settings import Settings, setting
from dschat.train.run_config import ModelConfig

CRITIC_FREE = ("rloo", "grpo")  # estimators that learn from no critic


@dataclass(frozen=True)
class RoleArguments(Settings):
    """Flags of the models behind the roles."""

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
        choices=tuple(LAYOUTS),
    )

    def names(
        self, actor: str, critic: str | None, estimator: str, *, has_reward_function: bool
    ) -> RoleNames:
        """The folder of every role.

        Raises:
            UserError: a role that nothing can play, or a flag that would do nothing.
        """
        trains_critic, reward = estimator not in CRITIC_FREE, self.reward_model_name_or_path
        if trains_critic and critic is None:
            raise UserError(
                f"--critic_model_name_or_path is required with --advantage_estimator {estimator}; "
                f"{' and '.join(CRITIC_FREE)} train no critic"
            )
        if self.init_head_randomly and not trains_critic:
            raise UserError(
                f"init_head_randomly: --advantage_estimator {estimator} trains no critic; drop "
                "the flag"
            )
        if reward is None and not self.init_head_randomly:
            reward = critic
        if reward is None and not has_reward_function:
            flags = "--reward_model_name_or_path REWARD_MODEL or --reward_function MODULE:NAME"
            given = "init_head_randomly" if self.init_head_randomly else estimator
            raise UserError(f"{given}: nothing gives rewards; add {flags}")
        if not trains_critic and critic not in (None, reward):
            raise UserError(
                f"critic_model_name_or_path {critic}: --advantage_estimator {estimator} trains no "
                f"critic, and {reward} gives the rewards; drop one of the two"
            )
        critic = critic if trains_critic else None
        return RoleNames(actor, critic, reward, self.init_head_randomly, self.share_trunk)

    def check_layout(
        self, models: dict[str, ModelConfig], *, train_base: bool, sharded_reward: bool
    ) -> None:
        """Stop where weights cannot be shared as asked.

        Args:
            models: of the roles that train. train_base: `--train_base_model`.
            sharded_reward: the reward model, also without a critic, is at ZeRO-3.

        Raises:
            UserError: naming the flag in the way.
        """
        if self.share_trunk != "all":
            return
        for name, model in models.items():
            obstacles = {
                f"{name}_lora_dim 0": model.lora.lora_dim == 0,
                f"{name}_zero_stage 3": model.zero_stage == 3,
                f"{name}_use_dora": model.lora.use_dora,
                f"{name}_modules_to_save": bool(model.lora.modules_to_save),
                f"{name}_quantize_base": model.lora.quantize_base is not None,
                "train_base_model": train_base,
            }
            found = next((flag for flag, is_there in obstacles.items() if is_there), None)
            if found is not None:
                raise UserError(f"share_trunk all: {found}: {_WHY[found.split('_', 1)[1]]}")
        if sharded_reward:
            raise UserError(f"share_trunk all: critic_zero_stage 3: {_WHY['zero_stage 3']}")


_BASE_CHANGES = "the base would change under the other roles; train adapters alone (LoRA)"
_WHY = {
    "lora_dim 0": _BASE_CHANGES,
    "modules_to_save": _BASE_CHANGES,
    "base_model": _BASE_CHANGES,
    "zero_stage 3": "two engines cannot shard the same weights; use zero_stage 0, 1 or 2",
    "use_dora": "it measures weights that the folder's own adapter is part of; drop it",
    "quantize_base": "adapters would sit on packed weights that others read; drop it",
}
