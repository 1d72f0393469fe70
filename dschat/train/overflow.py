"""Steps that fp16 skips because gradients overflow: counted, and limited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dschat.errors import UserError

_AT_MINIMUM = "loss scale already at minimum"  # of DeepSpeed's exception, which has no class


class Skipping(Protocol):
    """As much of an engine as is used here."""

    step: Callable[[], None]
    was_step_applied: Callable[[], bool]
    skipped_steps: int
    fp16_enabled: Callable[[], bool]


def limit_skips(engine: Skipping, most: int, title: str) -> None:
    """Make `engine.step` end the run, on every rank, after too many skipped steps in a row.

    A few are the search for a loss scale that fits. Without an end to them nothing trains.

    Args:
        most: `max_skipped_steps`. title: of what trains, for the message.
    """
    step, in_a_row = engine.step, 0

    def limited() -> None:
        nonlocal in_a_row
        try:
            step()
        except Exception as error:
            if _AT_MINIMUM not in str(error):
                raise
            raise UserError(_message(title, in_a_row + 1, "the loss scale is at its least")) from (
                error
            )
        in_a_row = 0 if engine.was_step_applied() else in_a_row + 1
        if in_a_row == most:
            raise UserError(_message(title, in_a_row, "max_skipped_steps"))

    engine.step = limited


def _message(title: str, count: int, reason: str) -> str:
    return (
        f"{title}: gradients overflowed fp16 in the last {count} optimizer steps, and all were "
        f"skipped ({reason}); use dtype bf16 or fp32, or lower learning rates"
    )


def skips(engine: Skipping) -> dict[str, float]:
    """Count the skipped steps of a run so far, as a figure; {} where none can be skipped."""
    return {"skipped_steps": float(engine.skipped_steps)} if engine.fp16_enabled() else {}
