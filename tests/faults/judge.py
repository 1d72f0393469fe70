"""Judge a run that met a fault: what it said and left, and whether its results are the right ones.

Every function returns complaints, a list of texts that is empty where all is well.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dschat.train.checkpoint_folder import END, checkpoints_in
from tests.faults.programs import OUTPUT, USERS_FILES
from tests.faults.runs import Outcome
from tests.helpers.resume_runs import figures

CHECKPOINTS = "checkpoints"
# Beside the model: the log of figures, which is compared by value, a lock that may stay, and files
# of other starts, or damaged, that were set aside.
NOT_RESULTS = re.compile(
    r"checkpoints/.*|metrics(\.\w+)?\.jsonl|(held_out_)?answers\.(unfinished|\d+)\.jsonl|\.lock"
)
MAY_STAY = {".lock"}
RESUMED = re.compile(r"^resumed from (\S+) at step (\d+)$", re.M)


@dataclass(frozen=True)
class Results:
    """What a finished run has written: SHA-256 of each file, figures without the clock's."""

    files: dict[str, str]
    figures: list[dict[str, object]]

    @classmethod
    def of(cls, output: Path) -> Results:
        """Read an output folder."""
        return cls(digests(output), figures(output))

    def differences(self, other: Results) -> list[str]:
        """Name what differs from a reference."""
        names = sorted(self.files.keys() | other.files.keys())
        found = [f"{n} differs" for n in names if self.files.get(n) != other.files.get(n)]
        if len(self.figures) != len(other.figures):
            found.append(f"{len(self.figures)} lines of metrics, not {len(other.figures)}")
        for mine, wanted in zip(self.figures, other.figures, strict=False):
            if mine != wanted:
                keys = sorted(k for k in mine | wanted if mine.get(k) != wanted.get(k))
                found.append(f"metrics of step {wanted.get('step')} differ in {', '.join(keys)}")
                break
        return found


def digests(output: Path) -> dict[str, str]:
    """SHA-256 of each result in an output folder, by relative path.

    An adapter names its base by an absolute path; the part of it that a case decides is left out.
    """
    found, here = {}, str(output.parent.resolve()).encode()
    for path in sorted(p for p in output.rglob("*") if p.is_file()):
        name = str(path.relative_to(output))
        if name not in USERS_FILES and not NOT_RESULTS.fullmatch(name):
            found[name] = hashlib.sha256(path.read_bytes().replace(here, b"")).hexdigest()
    return found


def error_lines(outcome: Outcome) -> list[str]:
    """The lines that say why a run ended, of all ranks."""
    return [x.strip() for x in outcome.stderr.splitlines() if x.strip().startswith("error: ")]


def spoken(outcome: Outcome, codes: Collection[int]) -> list[str]:
    """Judge how a run ended: one of these exit codes on each rank, in at most one line, alone."""
    found = []
    if outcome.hung:
        found.append(f"hung; killed after {outcome.seconds:.0f} s")
    if outcome.left:
        found.append("a process outlived its ranks")
    if not set(outcome.codes) <= set(codes):
        found.append(f"exit {outcome.codes}, wanted {sorted(codes)}")
    if "Traceback (most recent call last)" in outcome.stderr + outcome.stdout:
        kinds = [line for line in outcome.stderr.splitlines() if re.match(r"[\w.]+Error", line)]
        found.append(f"traceback ({(kinds or ['?'])[-1][:200]})")
    lines = error_lines(outcome)
    if len(lines) > 1:
        found.append(f"{len(lines)} error lines: {lines}")
    if 2 in outcome.codes and not lines:
        found.append("exit 2 without a line")
    return found


def finished(folder: Path, reference: Results) -> list[str]:
    """Judge what a run that has come to its end leaves: its results, the user's files, no more."""
    output = folder / OUTPUT
    if not (output / "metrics.jsonl").exists():
        return ["no metrics"]
    found = Results.of(output).differences(reference)
    saved = checkpoints_in(output / CHECKPOINTS)
    if saved and not (saved[max(saved)] / END).exists():
        found.append("no note at the newest checkpoint that the run has ended")
    for name, text in USERS_FILES.items():
        path = output / name
        if not path.exists() or path.read_text() != text:
            found.append(f"the user's {name} is lost")
    return found + leftovers(folder)


def mixture(output: Path, models: Sequence[dict[str, str]]) -> list[str]:
    """Judge what a reader finds in an output folder and its adapter: no model, or one of these.

    Args:
        models: digests of their files.
    """
    found, there = [], digests(output)
    for part, entry in {"": "config.json", "adapter": "adapter/adapter_config.json"}.items():
        here = _inside(there, part)
        if entry in here and here not in [_inside(model, part) for model in models]:
            found.append(f"a mixture of models: {', '.join(sorted(here))}")
    return found


def _inside(files: dict[str, str], folder: str) -> dict[str, str]:
    return {n: digest for n, digest in files.items() if n.rpartition("/")[0] == folder}


def leftovers(folder: Path) -> list[str]:
    """Name hidden and unfinished entries that nobody will use again."""
    output = folder / OUTPUT
    left = {*folder.glob(f".{OUTPUT}.*"), *(folder / "cache").rglob("*.tmp")}
    left |= {path for path in output.rglob(".*") if path.name not in MAY_STAY}
    return [f"{path.relative_to(folder)} is left" for path in sorted(left)]


def resumed_at(outcome: Outcome) -> int:
    """Step that a run has gone on from, 0 for the beginning."""
    found = RESUMED.findall(outcome.stdout)
    return int(found[-1][1]) if found else 0


def went_back(outcome: Outcome, saved: int) -> list[str]:
    """Judge where a run has gone on: no further back than the newest checkpoint of all before."""
    at = resumed_at(outcome)
    if at < saved:
        return [f"resumed at step {at}, step {saved} had been saved"]
    return []
