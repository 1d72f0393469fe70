"""What a run measures: weighted means, the console line, JSON lines, TensorBoard and W&B."""

import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dschat.errors import UserError

Reduce = Callable[[list[float]], list[float]]  # element-wise sum over ranks


class Mean:
    """A mean kept as a sum and its weight, so that parts of any size and rank combine exactly.

    The weight is what the sum runs over: tokens for a loss, pairs for an accuracy. With `reduce`
    the value is that of all ranks, and reading it is a collective call that every rank makes.
    """

    def __init__(self, reduce: Reduce | None = None):
        self.total = 0.0
        self.count = 0.0
        self._reduce = reduce

    def add(self, total: float, count: float = 1) -> None:
        """Add a sum over `count` tokens, pairs or steps."""
        self.total += float(total)
        self.count += float(count)

    @property
    def value(self) -> float:
        """The mean, or NaN where nothing was added on any rank."""
        return collect({"mean": self}, self._reduce)["mean"]

    def reset(self) -> None:
        """Start again from nothing."""
        self.total = self.count = 0.0


def collect(means: Mapping[str, Mean], reduce: Reduce | None = None) -> dict[str, float]:
    """Return the value of every mean, summed over ranks in a single call of `reduce`.

    Every rank holds the same names, in any order; their own hooks are not called.
    """
    names = sorted(means)
    flat = [x for name in names for x in (means[name].total, means[name].count)]
    if reduce is not None:
        flat = reduce(flat)
    pairs = zip(flat[::2], flat[1::2], strict=True)
    values = {n: t / c if c else math.nan for n, (t, c) in zip(names, pairs, strict=True)}
    return {name: values[name] for name in means}


def format_value(value: float) -> str:
    """Return a number in few characters: 2, 12,345, 1.234, 3.0e-05."""
    if not math.isfinite(value):
        return str(float(value))
    if float(value).is_integer():
        return f"{value:,.0f}"
    size = abs(value)
    if size >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.1e}"


def console_line(step: int, total: int | None, values: Mapping[str, float]) -> str:
    """Return `step 10/200 | loss 1.234 | lr 3.0e-05`, in the order of `values`."""
    head = f"step {step}" if total is None else f"step {step}/{total}"
    return " | ".join([head, *(f"{name} {format_value(value)}" for name, value in values.items())])


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    desc: str = "",
    enabled: bool = True,
    initial: int = 0,
) -> tqdm:
    """Return a tqdm bar over `iterable`, or one of `total` steps to `update`; silent if disabled.

    The bar takes figures by `set_postfix_str(...)`. Into a file it writes at most every ten
    seconds, since each refresh is a line there.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        disable=not enabled,
        dynamic_ncols=True,
        initial=initial,
        mininterval=interval,
    )


@dataclass(frozen=True)
class Continued:
    """The run that a resumed one continues: its metrics file as of a step."""

    metrics: Path
    step: int


class MetricLogger:
    """Writes figures to `<output_dir>/metrics.jsonl` and, if asked, to TensorBoard and W&B.

    One file a run: what an earlier run wrote is kept under a number. A resumed run continues its
    own: lines written after the step that it resumes at are cut off.

    Only the rank with `enabled_rank0` writes. A package that is asked for and missing raises
    UserError on every rank, so that none waits for another.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        enabled_rank0: bool,
        tensorboard_dir: str | Path | None = None,
        wandb_project: str | None = None,
        run_name: str | None = None,
        continued: Continued | None = None,
    ):
        if tensorboard_dir is not None:
            require_package("tensorboard", "--enable_tensorboard")
        if wandb_project is not None:
            require_package("wandb", "--wandb_project")
        self._file = self._tensorboard = self._wandb = None
        if not enabled_rank0:
            return
        path = Path(output_dir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if continued is None:
            set_aside(path)
        else:
            _take_up(path, continued.metrics)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard_dir is not None:
            module = importlib.import_module("torch.utils.tensorboard")
            hidden = {} if continued is None else {"purge_step": continued.step + 1}
            self._tensorboard = module.SummaryWriter(log_dir=str(tensorboard_dir), **hidden)
        if wandb_project is not None:
            module = importlib.import_module("wandb")
            self._wandb = module.init(project=wandb_project, name=run_name, dir=str(output_dir))

    def log(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Write one record of figures of this step; `kind` says of what (train, eval, ...).

        A line holds kind and step, then the figures by name. JSON has no NaN and no infinity:
        these stand as the strings "nan", "inf", "-inf".
        """
        if self._file is None:
            return
        figures = {name: float(values[name]) for name in sorted(values)}
        record = {"kind": kind, "step": int(step)}
        clash = record.keys() & figures.keys()
        if clash:
            raise ValueError(f"metric {min(clash)!r} has the name of a field of the record")
        record |= {name: x if math.isfinite(x) else str(x) for name, x in figures.items()}
        # One write and a flush per line: a killed run leaves whole lines.
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in figures.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            # The step is a figure of its own: W&B's must rise, but train and eval share one.
            named = {f"{kind}/{name}": value for name, value in figures.items()}
            self._wandb.log({"step": step, **named})

    def close(self) -> None:
        """Finish every writer; a second call does nothing."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._tensorboard = self._wandb = None

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def set_aside(path: Path) -> None:
    """Give an earlier run's file the first free number: metrics.jsonl becomes metrics.1.jsonl."""
    if not path.exists():
        return
    number = 1
    while (kept := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)


def _take_up(path: Path, earlier: Path) -> None:
    """Make the file what `earlier` is; one that does not begin so is of another run, and kept."""
    lines = earlier.read_bytes()
    if path.exists() and not path.read_bytes().startswith(lines):
        set_aside(path)
    part = path.with_suffix(".tmp")
    part.write_bytes(lines)
    os.replace(part, path)


def require_package(package: str, flag: str) -> None:
    """Raise UserError, with the command that installs it, when a flag's package is missing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{flag}: the package {package} is not installed; run `pip install {package}` "
            "or leave the flag out"
        )
