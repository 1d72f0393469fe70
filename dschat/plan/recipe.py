"""The recipe that is planned, and the settings of its step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.cli import parse
from dschat.errors import UserError, brief
from dschat.plan.flags import PlanFlags

AnySettings = SFTSettings | RewardSettings | DPOSettings | RLHFSettings
STEPS: dict[str, type[AnySettings]] = {
    "sft": SFTSettings,
    "reward": RewardSettings,
    "dpo": DPOSettings,
    "ppo": RLHFSettings,
}
RECIPES = Path(__file__).parents[1] / "recipes"


def settings_of(args: PlanFlags, others: Sequence[str]) -> tuple[Path, AnySettings]:
    """Read the recipe, with the step's own flags over it.

    Raises:
        UserError: no recipe, or settings that contradict each other.
    """
    recipe = recipe_of(args)
    return recipe, parse(step_of(recipe, args.step), ["--config", str(recipe), *others], None)


def recipe_of(args: PlanFlags) -> Path:
    """Find the recipe: named, or the one that a script names.

    Raises:
        UserError: a script without one.
    """
    if args.config is not None:
        return Path(args.config)
    assert args.script is not None
    try:
        content = Path(args.script).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"script {args.script}: cannot be read ({brief(error)})") from error
    found = re.search(r"^RECIPE=[\"']?([\w./-]+\.yaml)", content, re.MULTILINE)
    if found is None:
        raise UserError(f"script {args.script}: it names no recipe; give --config RECIPE.yaml")
    return RECIPES / found[1]


def step_of(recipe: Path, named: str | None) -> type[AnySettings]:
    """Choose the step's settings by its name, or by the recipe's: sft_8b.yaml.

    Raises:
        UserError: the file's name tells none.
    """
    name = named or re.split(r"[_.]", recipe.name)[0]
    if name not in STEPS:
        raise UserError(
            f"config {recipe}: its name tells no step; add --step sft, reward, dpo or ppo"
        )
    return STEPS[name]
