"""Who else keeps the figures of a run: TensorBoard, Weights & Biases, trackio.

All of them get the same names, `train/loss`, `eval/accuracy`, of the same steps.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dschat.errors import UserError, brief
from dschat.settings import Settings, setting
from dschat.train.checkpoint_folder import last_good
from dschat.utils.distributed import print_rank_0
from dschat.utils.files import disk_errors_named
from dschat.utils.printable import printable

TRACKERS = ("tensorboard", "wandb", "trackio")  # and the packages of that name
TRACKIO_PROJECT = "dschat"


@dataclass(frozen=True)
class LogConfig(Settings):
    """Destinations of figures beside OUTPUT_DIR/metrics.jsonl, and their interval."""

    log_every: int = setting(10, "optimizer steps between metrics", at_least=1, may_change=True)
    report_to: tuple[str, ...] = setting(
        (), "who else gets the figures", choices=TRACKERS, may_be_empty=True, may_change=True
    )
    enable_tensorboard: bool = setting(
        False, "write TensorBoard events, as --report_to tensorboard", may_change=True
    )
    tensorboard_path: str = setting(
        "tensorboard", "folder of the TensorBoard events", may_change=True
    )
    wandb_project: str | None = setting(
        None, "log to this Weights & Biases project, as --report_to wandb", may_change=True
    )
    trackio_project: str | None = setting(
        None,
        f"log to this trackio project, as --report_to trackio (its default: {TRACKIO_PROJECT})",
        may_change=True,
    )
    no_report: bool = setting(
        False, "do not make OUTPUT_DIR/report.html, the page of the run", may_change=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, flag in self.trackers.items():
            require_package(name, flag)

    @property
    def trackers(self) -> dict[str, str]:
        """Name those that are asked for, each with the setting that does."""
        asked = dict.fromkeys(self.report_to, "report_to")
        if self.enable_tensorboard:
            asked["tensorboard"] = "enable_tensorboard"
        if self.wandb_project is not None:
            asked["wandb"] = "wandb_project"
        if self.trackio_project is not None:
            asked["trackio"] = "trackio_project"
        return asked

    def check_writable(self) -> None:
        """Raise an error where the events of TensorBoard could not be written."""
        if "tensorboard" not in self.trackers:
            return
        place = f"tensorboard_path {self.tensorboard_path}"
        try:
            Path(self.tensorboard_path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{place}: {error.strerror}; give a writable folder") from error
        if not os.access(self.tensorboard_path, os.W_OK):
            raise UserError(f"{place}: nothing can be written there; give a writable folder")


class Tracker(Protocol):
    """Keeps figures somewhere."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step, by names such as `train/loss`."""

    def close(self) -> None:
        """Finish: all is where it should be."""


class TensorBoard:
    """Events in a folder; a resumed run hides what an earlier one wrote after its step.

    Every method raises UserError, with the run's newest checkpoint, where the disk takes no more.
    """

    def __init__(self, folder: str, output_dir: str, resumed_at: int | None):
        self._folder, self._output_dir = folder, output_dir
        module = importlib.import_module("torch.utils.tensorboard")
        hidden = {} if resumed_at is None else {"purge_step": resumed_at + 1}
        with self._one_line():
            self._writer: Any = module.SummaryWriter(log_dir=folder, **hidden)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write an event for each; all are on their way to the disk when this returns."""
        with self._one_line():
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()  # the writer's thread keeps an error for the call after

    def close(self) -> None:
        """Write what is left."""
        with self._one_line():
            self._writer.close()

    def _one_line(self) -> contextlib.AbstractContextManager[None]:
        remedy = functools.partial(last_good, self._output_dir)
        return disk_errors_named(f"tensorboard_path {self._folder}", remedy)


class WandB:
    """A run in a project of Weights & Biases."""

    def __init__(self, project: str | None, folder: str):
        self._run: Any = importlib.import_module("wandb").init(project=project, dir=folder)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send them; the step is a figure of its own: W&B's must rise, train and eval share one."""
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class Trackio:
    """A run in a project of trackio, on this machine."""

    def __init__(self, project: str):
        module = importlib.import_module("trackio")
        with contextlib.redirect_stdout(io.StringIO()):  # a dozen lines of greeting
            self._run: Any = module.init(project=project)
        print_rank_0(f"trackio: project {project}; to look: trackio show --project {project}")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Hand them on."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """Write what is left."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


def start(config: LogConfig, output_dir: str, resumed_at: int | None) -> dict[str, Tracker]:
    """Begin a run with each that is asked for, by its name.

    Raises:
        UserError: a service that takes no run, as one that wants a key first.
    """
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(config.tensorboard_path, output_dir, resumed_at),
        "wandb": lambda: WandB(config.wandb_project, output_dir),
        "trackio": lambda: Trackio(config.trackio_project or TRACKIO_PROJECT),
    }
    made = {}
    for name, flag in config.trackers.items():
        try:
            made[name] = makers[name]()
        except UserError:
            raise
        except Exception as error:
            reason = brief(error, with_type=True)
            raise UserError(f"{flag}: {name} takes no run ({reason}); drop the setting") from error
    return made


def tell(trackers: dict[str, Tracker], step: int, figures: Mapping[str, float]) -> None:
    """Hand figures to all; a service that fails is dropped with a line, and the run goes on."""
    for name, tracker in list(trackers.items()):
        try:
            tracker.log(step, figures)
        except Exception as error:
            if name == "tensorboard":  # a file: its disk is the run's own
                raise
            del trackers[name]
            reason = printable(brief(error, with_type=True), keep="")
            print_rank_0(f"{name}: gets no more figures ({reason}); metrics.jsonl has them all")


def finish(trackers: dict[str, Tracker]) -> None:
    """Close all; a second call does nothing."""
    while trackers:
        name, tracker = trackers.popitem()
        try:
            tracker.close()
        except Exception as error:
            if name == "tensorboard":
                raise
            print_rank_0(f"{name}: did not finish ({printable(brief(error, True), keep='')})")


def require_package(package: str, setting_name: str) -> None:
    """Raise UserError, with the command that installs it, when a setting's package is missing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{setting_name}: the package {package} is not installed; run `pip install {package}`, "
            "or drop the setting"
        )
