"""Figures of a run: console line, progress bar, JSON lines; others keep them by `trackers`."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from tqdm import tqdm

from dschat.settings import Settings
from dschat.train import observers, phases, trackers
from dschat.train.checkpoint_folder import disk_errors
from dschat.train.line_files import keep_longest, restore_lines, set_aside
from dschat.train.run_page import RunPage
from dschat.train.trackers import LogConfig
from dschat.utils.distributed import print_rank_0
from dschat.utils.plain_bar import EVERY, EVERY_SEEN, PlainBar
from dschat.utils.printable import window


def format_value(value: float) -> str:
    """Format a number in few characters: 2, 12,345, 1.234, 3.0e-05."""
    if not math.isfinite(value):
        return str(float(value))
    if float(value).is_integer():
        return f"{value:,.0f}"
    size = abs(value)
    if size >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.1e}"


def console_line(step: int, total: int | None, values: Mapping[str, float]) -> str:
    """Format `step 10/200 | loss 1.234 | lr 3.0e-05`, in the order of `values`."""
    head = f"step {step}" if total is None else f"step {step}/{total}"
    return " | ".join([head, *(f"{name} {format_value(value)}" for name, value in values.items())])


@dataclass(frozen=True)
class Continued:
    """The run that a resumed one continues: its metrics as of a step; None: nothing was saved."""

    metrics: Path | None
    step: int


class MetricLogger:
    """Writes figures to `<output_dir>/metrics.jsonl` and to the trackers that are asked for.

    One file a run: an earlier run's file is kept under a number. A resumed run continues its own:
    lines written after the step that it resumes at are removed. Rank 0 alone writes; without an
    output folder nobody does.
    """

    def __init__(
        self,
        config: LogConfig,
        output_dir: str | Path | None,
        rank: int,
        continued: Continued | None = None,
        settings: Settings | None = None,
    ):
        self.config, self.output_dir, self.continued = config, output_dir, continued
        self.rank = rank
        self._page: RunPage | None = None
        self._file: IO[str] | None = None
        self._trackers: dict[str, trackers.Tracker] = {}
        if output_dir is None or rank != 0:
            return
        self._path = Path(output_dir) / "metrics.jsonl"
        with disk_errors(output_dir):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if continued is None:
                set_aside(self._path)
            elif continued.metrics is None:
                keep_longest(self._path)
            else:
                restore_lines(self._path, continued.metrics)
            self._file = self._path.open("a", encoding="utf-8")
            if not config.no_report:
                self._page = RunPage(output_dir, settings)
        phases.mark(phases.START)
        resumed_at = None if continued is None else continued.step
        self._trackers = trackers.start(config, str(output_dir), resumed_at)

    @property
    def first_step(self) -> int:
        """Steps that the continued run has made."""
        return 0 if self.continued is None else self.continued.step

    def is_due(self, step: int, last: int) -> bool:
        """Tell whether a step's figures are written: those of every `log_every`-th and the last."""
        return step % self.config.log_every == 0 or step == last

    def log(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Write one record of this step's figures; `kind` is train or eval.

        An evaluation refreshes the page of the run.

        A line holds kind and step, then the figures by name. JSON has no NaN and no infinity:
        these stand as the strings "nan", "inf", "-inf".
        """
        if self._file is None:
            return
        figures = {name: float(values[name]) for name in sorted(values)}
        record: dict[str, Any] = {"kind": kind, "step": int(step)}
        clash = record.keys() & figures.keys()
        if clash:
            raise ValueError(f"metric {min(clash)!r} has the name of a field of the record")
        record |= {name: x if math.isfinite(x) else str(x) for name, x in figures.items()}
        self._write(record)
        trackers.tell(self._trackers, step, {f"{kind}/{n}": v for n, v in figures.items()})
        if kind == "eval" and self._page is not None:
            self._page.refresh()
        observers.tell(kind, step, figures)

    def warn(self, step: int, text: str) -> None:
        """Write a warning, or advice, as a record of its kind; the page of the run shows it."""
        if self._file is not None:
            self._write({"kind": "warning", "step": int(step), "text": text})

    def _write(self, record: Mapping[str, Any]) -> None:
        """Add a line, in one write and a flush: a killed run leaves complete lines."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        with disk_errors(self._path.parent, self._path):
            self._write_line(line)

    def _write_line(self, line: str) -> None:
        assert self._file is not None
        if not self._is_in_place():  # what went on would be seen by nobody
            self._file.close()
            self._file = self._path.open("a", encoding="utf-8")
            print_rank_0(f"{self._path}: was removed; a new one begins here")
        self._file.write(line)
        self._file.flush()

    def _is_in_place(self) -> bool:
        """Return whether the open file is still the one of this name; its folder may have moved."""
        assert self._file is not None
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Finish every writer, and make the page of the run; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            phases.mark(phases.SAVING)
            if self._page is not None:
                self._page.finish()
        trackers.finish(self._trackers)
        self._file = None


WIDE = 76  # columns that a bar with speed and a figure takes; of a narrower one this is left:
NARROW = "{desc}: {n_fmt}/{total_fmt}, {remaining}{postfix}"


class StepBar(tqdm):
    """A bar of steps; `made` are those that this process has made, also where no bar is shown."""

    made: ClassVar[int | None] = None

    def __init__(self, *args: Any, **kwargs: Any):
        StepBar.made = kwargs["initial"]
        super().__init__(*args, **kwargs)

    def update(self, n: float | None = 1) -> bool | None:
        """Count steps, and show them now and then."""
        StepBar.made = (StepBar.made or 0) + int(n or 0)
        return super().update(n)

    def show(self, figures: Mapping[str, float]) -> None:
        """Put figures after the bar: the first ones, as many as the window has room for."""
        columns, text = window(), ""
        alone = self.format_meter(**{**self.format_dict, "ncols": None, "postfix": None})
        for name, value in figures.items():
            more = f"{text}, {name} {format_value(value)}".removeprefix(", ")
            if columns is not None and len(f"{alone}, {more}") >= columns:
                break
            text = more
        self.set_postfix_str(text)


def progress_bar(total: int, desc: str, metrics: MetricLogger) -> StepBar:
    """Make a bar of `total` steps, silent on ranks other than 0.

    In a file it is a line now and then.
    """
    is_seen, columns = sys.stderr.isatty(), window()
    every = EVERY if columns is None else EVERY_SEEN
    return StepBar(
        total=total,
        desc=desc,
        disable=metrics.rank != 0,
        dynamic_ncols=is_seen,
        ncols=None if columns is None else columns - 1,
        initial=metrics.first_step,
        bar_format=NARROW if columns is not None and columns < WIDE else None,
        file=sys.stderr if is_seen else PlainBar(sys.stderr, every),
        mininterval=0.1 if is_seen else every,
    )


class StepLog:
    """Lines and a bar of a run's steps, and the writers of their figures."""

    def __init__(self, metrics: MetricLogger, total: int, desc: str):
        self.metrics, self.bar = metrics, progress_bar(total, desc, metrics)

    def say(self, text: str) -> None:
        """Print lines in place of the bar, which comes again below."""
        self.bar.clear()
        print_rank_0(text, self.metrics.rank)

    def close(self) -> None:
        """Close the bar and every writer."""
        self.bar.close()
        self.metrics.close()
