"""Flags of where rewards come from, and of the language modelling that PPO mixes in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dschat.errors import UserError
from dschat.models.reward_statistics import SCALINGS, reward_scaling
from dschat.rlhf.rewards import RewardFunction, Rewards
from dschat.settings import Settings, setting


@dataclass(frozen=True)
class RewardArguments(Settings):
    """Flags of the score of an answer."""

    reward_function: str | None = setting(
        None, "module:name of your function (prompt, answer) -> float"
    )
    reward_function_weight: float = setting(1.0, "factor of the function's value in the score")
    reward_model_weight: float = setting(
        1.0, "factor of the reward model's score; at 0 it is only watched"
    )
    reward_scaling: str = setting(
        "auto",
        "saved: the reward model's scores less their mean, over their spread, as step 2 saved "
        "them; auto: so where it did; none: as they are",
        choices=tuple(SCALINGS),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reward_function_weight", "reward_model_weight"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}: give a finite number")
        if self.reward_function is None and self.reward_function_weight != 1.0:
            raise UserError(
                f"reward_function_weight is {self.reward_function_weight}, and there is no "
                "function: give --reward_function module:name, or drop the weight"
            )
        has_function = self.reward_function is not None and self.reward_function_weight
        if self.reward_model_weight == 0 and not has_function:
            raise UserError(
                "reward_model_weight is 0: nothing is rewarded; give --reward_function "
                "module:name, or another weight"
            )

    def rewards(self, reward_model: str | None) -> Rewards:
        """The function imported and the scaling found; before models are loaded.

        Args:
            reward_model: folder or hub id; None where the function is all there is.

        Raises:
            UserError: no such function, a weight of a model that is not there, or no scaling.
        """
        if reward_model is None and self.reward_model_weight not in (0.0, 1.0):
            raise UserError(
                f"reward_model_weight is {self.reward_model_weight}, and there is no reward "
                "model: give --reward_model_name_or_path, or drop the weight"
            )
        if reward_model is None and self.reward_function_weight == 0:
            raise UserError(
                "reward_function_weight is 0, and there is no reward model: nothing is rewarded; "
                "give --reward_model_name_or_path, or another weight"
            )
        function = None
        if self.reward_function is not None:
            function = RewardFunction.load(self.reward_function)
        return Rewards(
            function=function,
            function_weight=self.reward_function_weight,
            model_weight=self.reward_model_weight,
            scaling=reward_scaling(self.reward_scaling, reward_model),
        )
