"""Settings of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.errors import UserError
from dschat.settings import Settings, setting
from dschat.train.checkpoint_folder import NEWEST


@dataclass(frozen=True)
class CheckpointConfig(Settings):
    """Interval and number of checkpoints, and the one that the run resumes from."""

    save_steps: int = setting(
        0,
        "steps (in step 3 iterations) between checkpoints under OUTPUT_DIR/checkpoints; 0: none",
        at_least=0,
        may_change=True,
    )
    save_total_limit: int = setting(
        1, "keep so many of them, the newest", at_least=1, may_change=True
    )
    resume: str | None = setting(
        None,
        "resume from this checkpoint; without a value from the newest, if there is one",
        bare=NEWEST,
        may_change=True,
    )
    resume_with_new_rates: bool = setting(
        False,
        "resume with the present learning rates and ratios, not the saved ones",
        may_change=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume_with_new_rates and self.resume is None:
            raise UserError("resume_with_new_rates: nothing is resumed; add resume")

    @property
    def in_use(self) -> bool:
        """Return whether checkpoints are read, or written other than by a signal."""
        return self.save_steps > 0 or self.resume is not None
