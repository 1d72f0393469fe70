"""A stage of a pipeline: one program, its flags, and the folder of the model that it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

FOLDERS = {
    "sft": "actor-models",
    "reward": "reward-models",
    "dpo": "dpo-models",
    "ppo": "step3-models",
}
# Flags of every program that a pipeline may give to all of its stages.
PASSED = ("num_train_epochs", "gradient_accumulation_steps", "num_warmup_steps", "save_steps")
RESUME = "--resume"


@dataclass(frozen=True)
class Stage:
    """One program of a pipeline.

    Attributes:
        name: by which messages call it. kind: a key of `FOLDERS`.
        command: what starts the program. argv: the program's flags in it.
        folder: where it writes.
        widths: hidden size of the models that its learning rates are meant for, by the prefix of
            their flags; without an entry rates stay.
        remark: a line about it.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    argv: tuple[str, ...]
    folder: Path
    widths: Mapping[str, int] = field(default_factory=dict)
    remark: str | None = None

    def with_flags(self, *flags: str) -> Stage:
        """Add flags, which win over those that are there."""
        return replace(self, command=(*self.command, *flags), argv=(*self.argv, *flags))

    @property
    def model(self) -> Path:
        """Folder of the model for the next stage: of PPO the actor's."""
        return self.folder / "actor" if self.kind == "ppo" else self.folder

    @property
    def is_finished(self) -> bool:
        """Return whether it has written its model, and no run of it was stopped after that."""
        from dschat.models.placing import files_of_model
        from dschat.models.save_plan import READY, holds_model
        from dschat.train.run_end import has_ended

        if not holds_model(self.model):
            return False
        # The log of a run that was stopped over an older model is newer than its checkpoint.
        names = files_of_model(self.model) or {READY}
        return has_ended(self.folder, [self.model / name for name in names])
