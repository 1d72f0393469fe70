"""Settings that a run may change when it goes on elsewhere: ranks, ZeRO stages, rows per device.

The rows of an optimizer step stay the same, and so does the order in which all of them come.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dschat.errors import UserError

ROWS, EVALUATION = "per_device_", "per_device_eval_batch_size"
MICRO_BATCHES, BY_TOKENS = "gradient_accumulation_steps", "max_tokens_per_batch"


def without_shape(
    place: str, record: Mapping[str, Any], now: Mapping[str, Any], processes: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Drop from the saved and the present settings those that may differ on another machine.

    Raises:
        UserError: together the ranks would take other batches than before.
    """
    before: int = record["processes"]
    saved: Mapping[str, Any] = record["settings"]
    by_tokens = now.get(BY_TOKENS) is not None
    together = [MICRO_BATCHES] if by_tokens else []
    together += [
        name for name in now if name.startswith(ROWS) and name != EVALUATION and not by_tokens
    ]
    for name in together:
        total = before * saved.get(name, 0)
        if total != processes * now[name]:
            fits = total % processes == 0
            remedy = (
                f"give {name} {total // processes}"
                if fits
                else f"start a number of processes that divides {total}"
            )
            raise UserError(
                f"resume {place}: {before} processes with {name} {saved.get(name)} took {total} "
                f"together, {processes} with {now[name]} would take {processes * now[name]}; "
                f"{remedy}, so that each step has the rows that it would have had"
            )
    free = {*together, EVALUATION, "offload"}

    def kept(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in settings.items()
            if name not in free and not name.endswith("zero_stage")
        }

    return kept(saved), kept(now)
