"""What a run is going to do, and whether that continues what a training state was saved by."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dschat.errors import UserError
from dschat.settings import flag_values
from dschat.train.engine import Recipe, num_accumulation_groups
from dschat.utils.ds_utils import EngineConfig, read_user_config
from dschat.utils.optim import OptimizerConfig

# Flags that a resumed run may give otherwise. Models and data are compared by content instead, and
# rates by what they come to in each group; every other flag must be what it was.
FREE_FLAGS = frozenset(
    (
        *("output_dir", "save_steps", "save_total_limit", "resume", "resume_with_new_rates"),
        *("log_every", "print_loss", "print_answers", "print_answers_interval"),
        *("enable_tensorboard", "tensorboard_path", "wandb_project"),
        *("deepspeed", "local_rank", "only_optimize_lora", "data_output_path"),
        "preprocessing_num_workers",
        *("model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path"),
        "reward_model_name_or_path",
        *("deepspeed_config", "dtype"),  # compared by what they come to
    )
)
RATE_FLAGS = ("learning_rate", "loraplus_lr_ratio")  # what their names end in
OVERRIDE = "--resume_with_new_rates"


@dataclass(frozen=True)
class StepPlan:
    """The way of a whole run: groups are optimizer steps, in step 3 iterations."""

    total_steps: int
    epoch_steps: tuple[int, ...]  # of each epoch; they differ where lengths decide the batches
    batches_per_step: int

    @classmethod
    def of(
        cls, batches: Sequence[int | None], batches_per_step: int, max_steps: int = 0
    ) -> StepPlan:
        """The steps over a loader's batches of each epoch; 0 `max_steps` is no limit.

        Batches that nobody has counted (None) make epochs until `max_steps`.
        """
        if None in batches:
            return cls(max_steps, (), batches_per_step)
        groups = tuple(num_accumulation_groups(count, batches_per_step) for count in batches)
        total = sum(groups)
        return cls(min(total, max_steps) if max_steps else total, groups, batches_per_step)

    @property
    def epochs(self) -> int:
        """At most; after `total_steps` a run ends anyway."""
        return len(self.epoch_steps) or self.total_steps

    def batches_of(self, step: int, epoch: int) -> int:
        """The batches of this epoch that are used up after a step in it."""
        return (step - sum(self.epoch_steps[:epoch])) * self.batches_per_step


@dataclass(frozen=True)
class EnginePlan:
    """How one engine is going to train."""

    zero_stage: int
    optimizer: OptimizerConfig
    flag_prefix: str = ""

    @classmethod
    def of(cls, engine: EngineConfig, recipe: Recipe, flag_prefix: str = "") -> EnginePlan:
        """From what the engine is built of."""
        return cls(engine.zero_stage, recipe.optimizer, flag_prefix)


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, as far as it is known before weights are loaded."""

    kind: str  # which step
    settings: Mapping[str, Any]
    engines: Mapping[str, EnginePlan]
    steps: StepPlan

    @classmethod
    def of(
        cls,
        kind: str,
        settings: Any,
        dtype: str,
        data: str,
        steps: StepPlan,
        engines: Mapping[str, EnginePlan],
        found: Mapping[str, Any] | None = None,
    ) -> Plan:
        """The plan of a step.

        Args:
            settings: the step's settings object. dtype: what its `auto` came to.
            data: digest of the training rows.
            found: what else flags came to, by names of their own (`flag.detail`).
        """
        values = flag_values(settings)
        kept = {k: v for k, v in values.items() if k not in FREE_FLAGS}
        kept = {k: v for k, v in kept.items() if not k.endswith(RATE_FLAGS)}
        user_config = values["deepspeed_config"]
        if user_config is not None:
            kept |= _flat("deepspeed_config", read_user_config(user_config))
        for name, plan in engines.items():
            fixed = {"betas": plan.optimizer.betas, "eps": plan.optimizer.eps}
            kept |= _flat(name, fixed)
        kept |= {"dtype": dtype, "rows": data, "total_steps": steps.total_steps}
        kept |= {"epoch_steps": steps.epoch_steps, **(found or {})}
        # As they come back from a file: tuples become lists.
        return cls(kind, json.loads(json.dumps(kept)), engines, steps)

    def record(self, groups: Mapping[str, list[str]], processes: int) -> dict[str, Any]:
        """The plan as a state's record holds it.

        Args:
            groups: the names of the groups that each engine trains.
        """
        engines = {
            name: {
                "zero_stage": plan.zero_stage,
                "loraplus_lr_ratio": plan.optimizer.loraplus_lr_ratio,
                "peak_rates": {g: plan.optimizer.rate(g) for g in groups[name]},
            }
            for name, plan in self.engines.items()
        }
        return {
            "kind": self.kind,
            "processes": processes,
            "engines": engines,
            "settings": self.settings,
        }


def _flat(name: str, value: Any) -> dict[str, Any]:
    """{"a.b.c": value} of a nested mapping."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key in value for k, v in _flat(f"{name}.{key}", value[key]).items()}


def check_plan(
    place: str, record: Mapping[str, Any], plan: Plan, processes: int, with_new_rates: bool
) -> None:
    """Stop unless this run, as planned, continues the one that the record tells of.

    Args:
        place: the state, for messages.

    Raises:
        UserError: naming the first thing that differs, what was saved, and what is asked for now.
    """
    if record["kind"] != plan.kind:
        raise UserError(f"resume {place}: a state of {record['kind']}, this is {plan.kind}")
    if record["processes"] != processes:
        raise UserError(
            f"resume {place}: saved by {record['processes']} processes, now there are {processes}; "
            f"start {record['processes']}, DeepSpeed cuts its state into one piece for each"
        )
    for name, engine in plan.engines.items():
        saved = record["engines"][name]["zero_stage"]
        if saved != engine.zero_stage:
            raise UserError(
                f"resume {place}: saved with --{engine.flag_prefix}zero_stage {saved}, now "
                f"{engine.zero_stage}; give {saved}, each stage cuts the state in its own way"
            )
    for name, saved, asked in _differences(record["settings"], plan.settings):
        raise UserError(_setting_message(place, name, saved, asked, plan.settings))
    if not with_new_rates:
        for name, engine in plan.engines.items():
            _check_asked_rates(place, record["engines"][name], engine)


def _differences(
    saved: Mapping[str, Any], asked: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*saved, *asked}, key=lambda n: (n in ("rows", *_DERIVED), n)):
        if saved.get(name) != asked.get(name):
            yield name, saved.get(name), asked.get(name)


# Settings without a flag; of two differences the one that has a flag is told.
_DERIVED = ("total_steps", "epoch_steps")


def _setting_message(
    place: str, name: str, saved: Any, asked: Any, settings: Mapping[str, Any]
) -> str:
    if name == "rows":
        paths = " ".join(settings["data_path"])
        return (
            f"resume {place}: the rows of --data_path {paths} have changed (digest {saved[:12]}, "
            f"now {asked[:12]}), or the tokenizer; a resumed run needs the same"
        )
    base, _, detail = name.partition(".")
    if detail and base in settings:  # what the flag came to, not what was given
        return (
            f"resume {place}: {detail} behind --{base} {_shown(settings[base])} was "
            f"{_short(saved)}, now {_short(asked)}; a resumed run needs the same"
        )
    flag = name if detail or name in _DERIVED else f"--{name}"
    return (
        f"resume {place}: saved with {flag} {_shown(saved)}, now {_shown(asked)}; "
        f"give {_shown(saved)}, nothing overrides it"
    )


def _short(value: Any) -> str:
    """A value as `_shown`, of a digest its beginning."""
    text = _shown(value)
    return text[:12] if len(text) == 64 else text


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "empty"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "not given" if value is None else str(value)


def _check_asked_rates(place: str, saved: Mapping[str, Any], plan: EnginePlan) -> None:
    """The ratio first: with another one, the rate of B differs as well."""
    rates, ratio = saved["peak_rates"], plan.optimizer.loraplus_lr_ratio
    if "lora_B" in rates and saved["loraplus_lr_ratio"] != ratio:
        raise UserError(
            f"resume {place}: saved with --{plan.flag_prefix}loraplus_lr_ratio "
            f"{saved['loraplus_lr_ratio']:g}, now {ratio:g}; give {saved['loraplus_lr_ratio']:g}, "
            f"or {OVERRIDE} to go on with {ratio:g}"
        )
    for group, rate in rates.items():
        asked = plan.optimizer.rate(group)
        if asked != rate:
            raise UserError(
                f"resume {place}: saved with a {plan.flag_prefix}learning rate of {rate:g} for "
                f"{group}, now {asked:g}; give the rate flags as they were, or {OVERRIDE} to go on "
                f"with {asked:g}"
            )
