"""Mean and spread of a reward model's scores, saved beside its weights; scores in their units.

Step 2 takes them over its evaluation set and saves them in every form of the model; step 3
reads them, so that reward clip and KL coefficient mean the same for any reward model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from dschat.errors import UserError, parse_json
from dschat.utils.distributed import print_rank_0
from dschat.utils.module.model_source import is_local, resolve_model

FILE = "reward_statistics.json"
VALUE_FILE = "value_scaling.json"  # a critic's: the scaling of its values in training
EVALUATION_FILE = "evaluation.json"  # report on the set that the model was evaluated on
T = TypeVar("T")


@dataclass(frozen=True)
class RewardStatistics:
    """Mean and spread of the scores of `count` answers, chosen and rejected together."""

    mean: float
    std: float  # of the population
    count: int
    data: str  # key of the rows that they were taken over

    @property
    def usable(self) -> bool:
        """Return whether scores can be divided by the spread."""
        is_finite = math.isfinite(self.mean) and math.isfinite(self.std)
        # Equal scores have a spread of rounding alone.
        return is_finite and self.std > 1e-6 * abs(self.mean)

    def scaled(self, scores: torch.Tensor) -> torch.Tensor:
        """Return (score - mean) / std."""
        return (scores - self.mean) / self.std


def write_statistics(statistics: RewardStatistics, folder: Path, name: str = FILE) -> None:
    """Write the statistics into a model's or an adapter's folder."""
    text = json.dumps(asdict(statistics), indent=2)
    (folder / name).write_text(text + "\n", encoding="utf-8")


def read_value_scaling(critic: str) -> RewardStatistics | None:
    """Read the scaling of a critic's values: that of its training, else that of its scores."""
    return read_statistics(critic, VALUE_FILE) or read_statistics(critic)


def read_evaluation(model_name_or_path: str) -> dict[str, Any] | None:
    """Read the report on the evaluation of a reward model's training; None where there is none.

    Raises:
        UserError: a file that holds something else.
    """
    return _read_beside(model_name_or_path, EVALUATION_FILE, _as_evaluation)


def read_statistics(model_name_or_path: str, name: str = FILE) -> RewardStatistics | None:
    """Read the statistics of a model folder, adapter folder or hub id; None where there are none.

    An adapter has its own, never those of its base.

    Raises:
        UserError: a file that holds something else.
    """
    return _read_beside(model_name_or_path, name, _as_statistics)


def _as_evaluation(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        raise UserError("holds no settings")
    return content


def _as_statistics(content: Any) -> RewardStatistics:
    try:
        statistics = RewardStatistics(**content)
        usable = statistics.usable
    except TypeError as error:
        raise UserError("no mean, std, count and data") from error
    if not usable:
        raise UserError(f"mean {statistics.mean}, std {statistics.std}")
    return statistics


def _read_beside(model_name_or_path: str, name: str, read: Callable[[Any], T]) -> T | None:
    """Read a JSON file beside the weights of a model, or of the adapter that is applied last."""
    source = resolve_model(model_name_or_path)
    file = _file(source.adapters[-1].folder if source.adapters else source.base, name)
    if file is None:
        return None
    try:
        return read(parse_json(file.read_text(encoding="utf-8")))
    except (UserError, ValueError) as error:
        problem = error if isinstance(error, UserError) else "is no JSON"
        raise UserError(f"{file}: {problem}; train step 2 again, or remove the file") from error


def _file(base: str | Path, name: str) -> Path | None:
    folder = Path(base).expanduser()
    if folder.is_dir() or is_local(str(base)):
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(str(base), name))
    except (OSError, ValueError, HfHubHTTPError):  # not there, or the hub is not
        return None


def reward_scaling(choice: str, reward_model: str | None) -> RewardStatistics | None:
    """Choose the scaling of scores and print it in one line; None: scores stay as they are.

    Args:
        choice: `auto` (where there are statistics), `saved` (there must be) or `none`.
        reward_model: folder or hub id; None where a reward function is all there is.

    Raises:
        UserError: `saved`, and there are none.
    """
    statistics = None
    if choice != "none" and reward_model is not None:
        statistics = read_statistics(reward_model)
    if choice == "saved" and statistics is None:
        place = "there is no reward model" if reward_model is None else f"no {FILE} in it"
        raise UserError(
            f"reward_scaling saved: {reward_model or 'reward function alone'}: {place}; train the "
            "reward model with step 2, which saves them, or give reward_scaling none"
        )
    if statistics is not None:
        print_rank_0(
            f"reward scaling: (score - {statistics.mean:.4g}) / {statistics.std:.4g}, by the "
            f"{statistics.count:,} scores of step 2's evaluation"
        )
    elif choice == "auto" and reward_model is not None:
        print_rank_0(f"reward scaling: none, {reward_model} holds no {FILE} (step 2 saves it)")
    return statistics
