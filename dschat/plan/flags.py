"""Flags of the planner itself; those of the step that it plans are the step's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dschat.errors import UserError
from dschat.settings import Settings, setting


@dataclass(frozen=True)
class PlanFlags(Settings):
    """Flags of the planner itself."""

    config: str | None = setting(
        None, "recipe of a step, or of several stages: a YAML file, or a name of `dschat run`'s"
    )
    script: str | None = setting(None, "training script, in place of its recipe")
    step: str | None = setting(
        None, "(default: by the recipe's name)", choices=("sft", "reward", "dpo", "ppo")
    )
    gpu: str = setting("a6000", "by its short name")
    gpus: int = setting(1, "on each machine", at_least=1)
    nodes: int = setting(1, "machines", at_least=1)
    memory: float | None = setting(None, "GiB of a GPU, in place of the table's", above=0)
    model: str | None = setting(
        None, "folder or name of the model, or actor (default: the recipe's)"
    )
    critic: str | None = setting(None, "folder or name of critic and reward model")
    network: float | None = setting(None, "GB/s of a GPU to another machine (default: 25)", above=0)
    efficiency: float | None = setting(
        None, "share of the peak in training (default: 0.4)", above=0, at_most=1
    )
    usd_per_gpu_hour: float | None = setting(None, "price, for the cost of a step", at_least=0)
    json: bool = setting(False, "print JSON")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.config is None) == (self.script is None):
            raise UserError("give --config RECIPE.yaml, or --script SCRIPT.sh")
        for name in ("config", "script"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise UserError(f"{name} {path}: no such file; check the path")

    def unused(self, step: str) -> Iterator[str]:
        """Yield a line for each flag that does nothing for this step."""
        if self.critic is not None and step != "ppo":
            yield f"--critic does nothing: {step} has none"
        if self.network is not None and self.nodes == 1:
            yield "--network does nothing with --nodes 1"
