"""Checks that a run continues a checkpoint: its plan before weights load, its engines after."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dschat.errors import UserError
from dschat.models.small_files import Digests, small_file_digests
from dschat.settings import Settings, flag_values, flags_of
from dschat.train.machine import without_shape
from dschat.train.steps import StepPlan
from dschat.utils.ds_json import read_user_config
from dschat.utils.optim_config import OptimizerConfig

OVERRIDE = "resume_with_new_rates"
# Facts beside the settings; a difference in a setting, which may be their cause, is reported first.
FACTS = ("rows", "total_steps", "epoch_steps")


def model_files(settings: Settings) -> dict[str, Digests]:
    """Digest each model's small files, by the setting that names the model."""
    return {
        name: small_file_digests(value)
        for name, value in flag_values(settings).items()
        if name.endswith("model_name_or_path") and value is not None
    }


@dataclass(frozen=True)
class RunPlan:
    """All that decides a run's result and is known before weights load.

    Attributes:
        kind: the program, such as "step 1 (SFT)".
        optimizers: of every model that trains, by its name.
        dtype: the resolved one. data_key: digest of the training rows.
        derived: contents that settings stand for, by "setting.detail"; digests as texts.
        model_files: as that function gives them.
    """

    kind: str
    settings: Settings
    optimizers: Mapping[str, OptimizerConfig]
    dtype: str
    data_key: str
    steps: StepPlan
    derived: Mapping[str, object] = field(default_factory=dict)
    model_files: Mapping[str, Digests] = field(default_factory=dict)

    @functools.cached_property
    def fixed(self) -> dict[str, Any]:
        """Everything that a resumed run must repeat, by name, in the form that JSON gives back.

        Models and data are compared by content, the DeepSpeed JSON by its entries, rates in each
        parameter group; every other setting by its value, unless it `may_change`.
        """
        fixed = {
            flag.name: flag.value(self.settings)
            for flag in flags_of(type(self.settings))
            if not (flag.rule.may_change or flag.rule.retired)
        }
        path = flag_values(self.settings)["deepspeed_config"]
        if path is not None:
            fixed |= _flattened("deepspeed_config", read_user_config(path))
        for name, optimizer in self.optimizers.items():
            fixed |= {f"{name}.betas": optimizer.betas, f"{name}.eps": optimizer.eps}
        fixed |= {"dtype": self.dtype, "rows": self.data_key, **self.derived}
        fixed |= {"total_steps": self.steps.total_steps, "epoch_steps": self.steps.epoch_steps}
        return json.loads(json.dumps(fixed))

    def record(
        self, groups: Mapping[str, Mapping[str, Mapping[str, list[int]]]], processes: int
    ) -> dict[str, Any]:
        """Describe the plan for a checkpoint; `groups` are each engine's `named_groups`."""
        engines = {
            name: {
                "loraplus_lr_ratio": optimizer.loraplus_lr_ratio,
                "peak_rates": {group: optimizer.rate(group) for group in groups[name]},
                "parameters": groups[name],
            }
            for name, optimizer in self.optimizers.items()
        }
        return {
            "kind": self.kind,
            "processes": processes,
            "engines": engines,
            "settings": self.fixed,
            "model_files": {name: dict(files) for name, files in self.model_files.items()},
        }

    def check_continues(
        self, place: str, record: Mapping[str, Any], processes: int, with_new_rates: bool
    ) -> None:
        """Check that this run continues the one that the record describes.

        Args:
            place: the checkpoint, for messages.

        Raises:
            UserError: naming the first difference, the value saved and the value now.
        """
        if record["kind"] != self.kind:
            raise UserError(
                f"resume {place}: a checkpoint of {record['kind']}, this is {self.kind}"
            )
        saved, now = record["settings"], self.fixed
        if record.get("portable"):
            saved, now = without_shape(place, record, now, processes)
        elif record["processes"] != processes:
            raise UserError(
                f"resume {place}: saved by {record['processes']} processes, now there are "
                f"{processes}; start {record['processes']}, each holds a shard of it, or make it "
                f"portable: python -m dschat.checkpoint convert {place}"
            )
        differing = sorted(n for n in {*saved, *now} if saved.get(n) != now.get(n))
        settings = [n for n in differing if n not in FACTS and not n.endswith(".rows")]
        if not settings:  # which may be why a model's files differ, and those why the rows do
            self._check_model_files(place, record.get("model_files", {}))
        for name in settings or differing:
            difference = self._explain(name, saved.get(name), now.get(name))
            raise UserError(f"resume {place}: {difference}")
        if not with_new_rates:
            for name, optimizer in self.optimizers.items():
                _check_same_rates(place, name, record["engines"][name], optimizer)

    def _check_model_files(self, place: str, saved: Mapping[str, Digests]) -> None:
        """Refuse a small file of a model that changed since the run began.

        Args:
            saved: as `model_files`; {} in checkpoints of versions that did not record it.
        """
        for setting in sorted(saved.keys() & self.model_files.keys()):
            before, now = saved[setting], self.model_files[setting]
            for file, digest in sorted(before.items()):
                if digest == now.get(file):
                    continue
                state, remedy = "is not as it was when the run began", "put it back"
                if now.get(file) is None:
                    state = "is no longer there"
                elif digest is None:
                    state, remedy = "was not there when the run began", "remove it"
                raise UserError(
                    f"resume {place}: {file} of {setting} "
                    f"{flag_values(self.settings)[setting]} {state}; {remedy}, or start a new run"
                )

    def _explain(self, name: str, saved: Any, now: Any) -> str:
        """Describe in what a setting or a content differs, and what to do."""
        values = flag_values(self.settings)
        if name == "rows":
            return (
                f"the rows of data_path {_shown(values['data_path'])} have changed (digest "
                f"{saved[:12]}, now {now[:12]}), or the tokenizer; a resumed run needs the same"
            )
        if name in self.derived:
            setting, detail = name.split(".", 1)
            before, after = (v[:12] if isinstance(v, str) else _shown(v) for v in (saved, now))
            return (
                f"{detail} of {setting} {_shown(values[setting])} was {before}, now {after}; a "
                "resumed run needs the same"
            )
        remedy = "drop it" if saved is None else f"give {_shown(saved)}"
        return (
            f"saved with {name} {_shown(saved)}, now {_shown(now)}; {remedy}, nothing overrides it"
        )


def _flattened(name: str, value: Any) -> dict[str, Any]:
    """{"a.b.c": value} of a nested mapping."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key in value for k, v in _flattened(f"{name}.{key}", value[key]).items()}


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "empty"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "not given" if value is None else str(value)


def _check_same_rates(
    place: str, name: str, saved: Mapping[str, Any], optimizer: OptimizerConfig
) -> None:
    """Refuse another ratio first: with one, the rate of B differs as well."""
    prefix = "" if name == "model" else f"{name}_"
    rates, ratio = saved["peak_rates"], optimizer.loraplus_lr_ratio
    if "lora_B" in rates and saved["loraplus_lr_ratio"] != ratio:
        raise UserError(
            f"resume {place}: saved with {prefix}loraplus_lr_ratio "
            f"{saved['loraplus_lr_ratio']:g}, now {ratio:g}; give {saved['loraplus_lr_ratio']:g}, "
            f"or {OVERRIDE} to continue with {ratio:g}"
        )
    for group, rate in rates.items():
        now = optimizer.rate(group)
        if now != rate:
            raise UserError(
                f"resume {place}: saved with a {prefix}learning rate of {rate:g} for {group}, now "
                f"{now:g}; give the rates as they were, or {OVERRIDE} to continue with {now:g}"
            )
