"""What a run wrote into its output folder: figures by step, warnings, answers, its description."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dschat.errors import brief, parse_json
from dschat.utils.files import regular

METRICS = "metrics.jsonl"
DESCRIPTION = "run.json"  # program, settings, versions
ANSWERS = "answers.jsonl"  # those that a run has shown
HELD_OUT = "held_out_answers.jsonl"  # answers to the same held-out prompts at each evaluation
BASE_ANSWERS = "base_answers.jsonl"  # to some of them, see dschat.rlhf.base_answers
EVALUATION = "evaluation.json"  # of a reward model, see dschat.train.pair_report

Points = list[tuple[int, float]]  # step and value


@dataclass(frozen=True)
class Warned:
    """A warning of a run, or its advice."""

    step: int
    text: str


@dataclass
class Records:
    """All that a page shows.

    Attributes:
        train, held_out: points of each figure by its name; what is not finite is NaN in training,
            a gap of its curve, and left out of the others.
        answers: records of held-out answers by the iteration of their evaluation.
        base_answers: of the model that step 1 began with, by their prompts; empty where none are.
        description: `program`, `settings` and `versions`; empty where the run wrote none.
        evaluation: the closing evaluation of a reward model; empty where there is none.
    """

    train: dict[str, Points] = field(default_factory=dict)
    held_out: dict[str, Points] = field(default_factory=dict)
    warnings: list[Warned] = field(default_factory=list)
    answers: dict[int, list[Mapping[str, Any]]] = field(default_factory=dict)
    base_answers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Names of all figures."""
        return self.train.keys() | self.held_out.keys()


def read(folder: Path) -> Records:
    """Read a run's output folder; a last line that is still being written is left out.

    Raises:
        FileNotFoundError: there are no metrics.
    """
    records = Records(
        description=_json(folder / DESCRIPTION), evaluation=_json(folder / EVALUATION)
    )
    for line in _lines(folder / METRICS):
        kind, step = line["kind"], int(line["step"])
        if kind == "warning":
            records.warnings.append(Warned(step, line["text"]))
            continue
        series = records.train if kind == "train" else records.held_out
        for name, value in line.items():
            if name in ("kind", "step"):
                continue
            number = float(value)  # JSON has no NaN: such figures are text
            if math.isfinite(number):
                series.setdefault(name, []).append((step, number))
            elif kind == "train":
                series.setdefault(name, []).append((step, math.nan))
    if (folder / HELD_OUT).exists():
        for line in _lines(folder / HELD_OUT):
            records.answers.setdefault(int(line["iteration"]), []).append(line)
    if (folder / BASE_ANSWERS).exists():
        records.base_answers = {line["prompt"]: line for line in _lines(folder / BASE_ANSWERS)}
    return records


def evaluations(folder: Path) -> list[Mapping[str, Any]]:
    """Read the evaluations of a run, in order; none where it wrote no metrics."""
    path = folder / METRICS
    return [line for line in _lines(path) if line["kind"] == "eval"] if path.is_file() else []


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    # Bytes: texts may hold characters that end a line elsewhere.
    with regular(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _object(line, f"{path.name} line {number}")


def _json(path: Path) -> dict[str, Any]:
    return _object(regular(path).read_bytes(), path.name) if path.exists() else {}


def _object(text: bytes, place: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: naming the place.
    """
    try:
        value = parse_json(text.decode())
    except ValueError as error:
        raise ValueError(f"{place}: {brief(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place}: holds no JSON object")
    return value
