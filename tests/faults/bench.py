"""The workplace of the cases: inputs, references and half-finished runs, each made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from filelock import FileLock

from tests.faults import judge
from tests.faults.judge import Results
from tests.faults.library import Aim
from tests.faults.programs import OLDER, OUTPUT, Layout, copy_inputs, write_inputs
from tests.faults.runs import Outcome, start
from tests.faults.sites import Call, published, read_trace, sites_of

KEPT = 2  # checkpoints that a run keeps: the newest, and one to stand in for it


@dataclass(frozen=True)
class Reference:
    """A layout's run without checkpoints, and one with them, that nothing happened to.

    Attributes:
        sites: calls of the second by site. trace_bytes: of its trace. older:
            digests of the model that it replaces.
    """

    results: Results
    sites: dict[str, int]
    trace_bytes: int
    older: dict[str, str]


class Bench:
    """One folder in which cases are run; several processes may share it."""

    def __init__(self, root: Path):
        self.root = root.resolve()

    @cached_property
    def inputs(self) -> Path:
        """Data and models."""
        return self._once("inputs", write_inputs)

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        """Make a folder unless it is there, whoever else wants it."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                part = path.with_name(f"{path.name}.part")
                shutil.rmtree(part, ignore_errors=True)
                make(part)
                part.rename(path)
        return path

    def reference(self, layout: Layout) -> Reference:
        """What a layout's run comes to."""
        path = self._once(f"references/{layout.name}", lambda part: self._refer(layout, part))
        kept = json.loads((path / "reference.json").read_text())
        return Reference(
            Results(**kept["results"]), kept["sites"], kept["trace_bytes"], kept["older"]
        )

    def _refer(self, layout: Layout, part: Path) -> None:
        results = []
        for name, argv in (("plain", layout.argv()), ("saving", layout.saving(KEPT))):
            run = Workplace(copy_inputs(self.inputs, part / name / "run", layout), layout)
            outcome = run.start(argv)
            if any(outcome.codes):
                raise RuntimeError(f"{layout.name}: no reference\n{outcome.stderr[-3000:]}")
            results.append(Results.of(run.output))
        plain, saving = results
        if layout.plain != layout:
            plain = self.reference(layout.plain).results
        if differences := saving.differences(plain):
            raise RuntimeError(f"{layout.name}: saving checkpoints changes it: {differences}")
        kept = {
            "results": asdict(plain),
            "sites": sites_of(run.calls),
            "older": judge.digests(self.inputs / OLDER) if layout.record.replaces else {},
            "trace_bytes": (part / "saving/logs-1/trace").stat().st_size,
        }
        (part / "reference.json").write_text(json.dumps(kept))

    def stopped(self, layout: Layout) -> Path:
        """A folder whose run was killed in its third save, two checkpoints lying there."""

        def make(part: Path) -> None:
            run = Workplace(copy_inputs(self.inputs, part / "run", layout), layout)
            third = 3 * layout.record.save_steps
            aim = Aim("kill", f"mkdir {OUTPUT}/checkpoints/.step-{third:06d}.tmp")
            outcome = run.start(layout.saving(KEPT), aim=aim)
            present = sorted(p.name for p in (run.output / "checkpoints").glob("step-*"))
            if not outcome.killed or len(present) != KEPT:
                raise RuntimeError(f"{layout.name}: {outcome.codes}, {present}, {outcome.stderr}")

        return self._once(f"stopped/{layout.name}", make) / "run"

    def fresh(self, layout: Layout, case: str) -> Workplace:
        """A new folder for a case, with inputs and the user's own files."""
        return self._place(layout, case, self.inputs)

    def copy(self, layout: Layout, case: str, source: Path) -> Workplace:
        """A copy of a half-finished run's folder for a case."""
        return self._place(layout, case, source)

    def _place(self, layout: Layout, case: str, source: Path) -> Workplace:
        path = self.root / "cases" / "".join(c if c.isalnum() or c in "-_." else "_" for c in case)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        if source == self.inputs:
            return Workplace(copy_inputs(source, path / "run", layout), layout)
        shutil.copytree(source, path / "run", symlinks=True)
        return Workplace(path / "run", layout)


class Workplace:
    """The folder of one case, and the runs that are started in it one after the other."""

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout
        self.output = folder / OUTPUT
        self.outcomes: list[Outcome] = []
        self.saved = 0  # newest step that any run has saved

    def start(self, argv: list[str], **options) -> Outcome:
        """Start a run here; see `runs.start`."""
        logs = self.folder.parent / f"logs-{len(self.outcomes) + 1}"
        logs.mkdir()
        trace = logs / "trace"
        outcome = start(argv, self.folder, logs, ranks=self.layout.ranks, trace=trace, **options)
        self.calls: list[Call] = read_trace(trace) if trace.exists() else []
        self.outcomes.append(outcome)
        self.saved = max(self.saved, published(self.calls))
        return outcome

    def remove(self) -> None:
        """Remove the case's folder, logs included."""
        shutil.rmtree(self.folder.parent)

    def remove_older(self) -> None:
        """Leave the newest checkpoint alone."""
        present = sorted((self.output / "checkpoints").glob("step-*"))
        for older in present[:-1]:
            shutil.rmtree(older)
