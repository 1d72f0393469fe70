"""The steps as Python objects: settings go in, `train()` runs the step's own program, a run comes.

run = SFT(model_name_or_path="./model", data_path="./pairs.jsonl", lora_dim=16).train()
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar, cast

import numpy as np

from dschat.api.rows import as_files, is_named
from dschat.api.run import Run
from dschat.command.registry import COMMANDS
from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.paths import check_paths
from dschat.errors import UserError
from dschat.settings import Settings, flags_of
from dschat.train import run_lock
from dschat.train.observers import observed_by
from dschat.utils import rank_watch

S = TypeVar("S", bound=Settings)
ROWS = ("data_path", "sft_only_data_path")  # settings whose value may be rows
Callback = Callable[[int, Mapping[str, float]], object]  # step, figures by name


class Step(Generic[S]):
    """A step that can train.

    Args:
        settings: a settings object. flags: instead of it, the command's flags by name; a model may
            be the run that trained it, and data_path rows in memory (`rows.as_files`).

    Raises:
        UserError: an unknown flag (with the nearest), a value it cannot have, a path where nothing
            is.
    """

    SETTINGS: ClassVar[type[Settings]]
    COMMAND: ClassVar[str]
    MODEL: ClassVar[str] = ""  # folder of the model below output_dir

    settings: S

    def __init__(self, settings: S | None = None, /, **flags: Any):
        if settings is not None and flags:
            raise UserError(f"{next(iter(flags))}: give a settings object, or flags by name")
        made = self.SETTINGS.of(**_plain(self.SETTINGS, flags)) if settings is None else settings
        if not isinstance(made, self.SETTINGS):
            name = type(self).__name__
            raise UserError(
                f"{name} takes {self.SETTINGS.__name__}, not {type(made).__name__}; flags come by "
                f"name, {name}(**flags)"
            )
        check_paths(made)
        self.settings = cast(S, made)

    def train(
        self, *, on_step: Callback | None = None, on_evaluation: Callback | None = None
    ) -> Run:
        """Train in this process, to the end.

        Args:
            on_step: called with step and figures at every `log_every`-th step, in PPO at every
                iteration. on_evaluation: likewise on held-out rows. What they raise ends the run.

        Raises:
            UserError: what the command would end with in one line.
        """
        for name, given in (("on_step", on_step), ("on_evaluation", on_evaluation)):
            if given is not None and not callable(given):
                raise UserError(f"{name} is {given!r}: give a function of step and figures")
        callbacks = {"train": on_step, "eval": on_evaluation}

        def observe(kind: str, step: int, figures: Mapping[str, float]) -> None:
            callback = callbacks.get(kind)
            if callback is not None:
                callback(step, figures)

        program = _program(self.COMMAND)
        try:
            with observed_by(observe):
                program.main(self.settings)
        finally:
            rank_watch.stop()
            run_lock.release()
        folder = Path(_value(self.settings, "output_dir"))
        return Run(folder, folder / self.MODEL, scores=self.COMMAND == "reward")


class SFT(Step[SFTSettings]):
    """Step 1, supervised fine-tuning: `dschat sft`."""

    SETTINGS, COMMAND = SFTSettings, "sft"


class RewardModel(Step[RewardSettings]):
    """Step 2, a reward model from preferences: `dschat reward`."""

    SETTINGS, COMMAND = RewardSettings, "reward"


class DPO(Step[DPOSettings]):
    """Steps 2 and 3 in one, from preferences alone: `dschat dpo`."""

    SETTINGS, COMMAND = DPOSettings, "dpo"


class PPO(Step[RLHFSettings]):
    """Step 3, PPO, RLOO or GRPO: `dschat ppo`."""

    SETTINGS, COMMAND, MODEL = RLHFSettings, "ppo", "actor"


def _plain(cls: type[Settings], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Write paths as texts, rows into files, and let one text stand for a list of one."""
    lists = {flag.name for flag in flags_of(cls) if flag.kind.is_tuple}
    plain = {}
    for name, value in flags.items():
        if isinstance(value, Step):
            raise UserError(f"{name} is a step: give the run that its train() returns")
        if name in ROWS and not is_named(value):
            value = as_files(value, name, flags.get("data_output_path"))
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, np.generic):
            value = value.item()
        plain[name] = (value,) if name in lists and isinstance(value, str) else value
    return plain


def _value(settings: Settings, name: str) -> Any:
    (flag,) = (flag for flag in flags_of(type(settings)) if flag.name == name)
    return flag.value(settings)


def _program(command: str) -> ModuleType:
    """Import the program of a command, once; it does not run yet."""
    name = f"dschat_step_{command}"
    if name not in sys.modules:
        file = COMMANDS[command].file
        assert file is not None
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]
