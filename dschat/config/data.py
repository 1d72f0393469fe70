"""Check streamed data against the settings of a run."""

from __future__ import annotations

from dschat.data.config import DataConfig
from dschat.errors import UserError
from dschat.train.run_config import RunConfig


def check_streaming(
    data: DataConfig, run: RunConfig, max_steps: int, batching: str | None = None
) -> None:
    """Raise an error where rows that nobody has counted cannot serve.

    Args:
        batching: the setting that asks for batches other than by rows.

    Raises:
        UserError: naming the setting in the way.
    """
    if not data.streaming:
        return
    if max_steps < 1:
        raise UserError(
            "streaming: the number of rows, and so of steps, is not known; give max_steps"
        )
    refused = {
        "max_train_samples": (data.max_train_samples is not None, "give max_steps alone"),
        "preprocessing_num_workers": (
            data.preprocessing_num_workers is not None,
            "each rank tokenises its own rows; drop it",
        ),
        "num_train_epochs": (run.num_train_epochs > 1, "max_steps is the only limit; drop it"),
        "save_steps or resume": (
            run.checkpoint.in_use,
            "a stream cannot go on from its middle, nor notice an edited file; drop it",
        ),
        batching: (batching is not None, "it needs all lengths of an epoch; drop it"),
    }
    for name, (is_given, why) in refused.items():
        if is_given:
            raise UserError(f"streaming and {name}: {why}")
