"""The user's DeepSpeed JSON: read it, merge it, hold it against the installed DeepSpeed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from dschat.errors import UserError, brief, parse_json
from dschat.settings import unknown

# Blocks that DeepSpeed reads key by key; the others are models that check themselves, or belong to
# whoever they configure.
READ_BY_KEY: dict[str, set[str]] = {
    "activation_checkpointing": set(),
    "aio": {"thread_count"},
    "checkpoint": set(),
    "data_types": set(),
    "flops_profiler": set(),
    "optimizer": {"type", "params", "legacy_fusion"},  # asked for in turn, up to the first missing
}
DTYPES_OF = {
    "buffer_dtype",
    "grad_accum_dtype",
    "param_dtype",
}  # of data_types, read when an engine is made
MOST_BYTES = 10**6  # of a JSON; weights given by mistake have more, a device has no end
NO_SUCH_KEY = "; this DeepSpeed has none like it"
OF_INITIALIZE = {"data_parallel_size", "sequence_parallel_size"}  # read before the config is


def read_user_config(path: str) -> dict:
    """Read a DeepSpeed JSON.

    Raises:
        UserError: the file is missing, cannot be read, holds no JSON object, or a key twice.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise UserError(f"deepspeed_config {path}: has more than {MOST_BYTES:,} bytes")
        config = parse_json(text.decode())
    except FileNotFoundError as error:
        raise UserError(f"deepspeed_config {path}: no such file") from error
    except OSError as error:
        raise UserError(f"deepspeed_config {path}: {error.strerror}; give a JSON file") from error
    except ValueError as error:
        raise UserError(f"deepspeed_config {path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"deepspeed_config {path}: holds no JSON object, write {{...}}")
    return config


def merge_into(base: dict, over: dict, place: str) -> None:
    """Merge `over` into `base`, key by key and in place; "auto" keeps what is there.

    Raises:
        UserError: a plain value where an object belongs, or the other way round.
    """
    for key, value in over.items():
        if value == "auto":
            continue
        if key in base and isinstance(base[key], dict) != isinstance(value, dict):
            kind = "an object" if isinstance(base[key], dict) else "a plain value"
            raise UserError(f"{place} {key} is {value!r}: give {kind}")
        if isinstance(value, dict):
            merge_into(base.setdefault(key, {}), value, f"{place} {key}:")
        else:
            base[key] = value


def check_known(config: dict, user: dict, place: str) -> None:
    """Refuse keys that the installed DeepSpeed does not know: it ignores most of them silently.

    Its own configuration is built from `config` by a dict that notes which keys are asked for.

    Args:
        user: the entries of `config` that are the user's. place: for the message.

    Raises:
        UserError: a key that is unknown, with the nearest, or a value that DeepSpeed refuses.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
    from pydantic import ValidationError

    asked = _Asked(config)
    asked.pop("train_batch_size", None)  # made of the others and of the ranks there are
    try:
        DeepSpeedConfig(asked)
    except ValidationError as error:
        raise UserError(f"{place} {_first_problem(error, user)}") from error
    except Exception as error:
        raise UserError(f"{place} DeepSpeed refuses it ({brief(error, with_type=True)})") from error
    for name in DTYPES_OF & {*config.get("data_types", {})}:
        value = config["data_types"][name]
        try:
            DtypeEnum(value)
        except ValueError as error:
            raise UserError(
                f"{place} data_types: {name} is {value!r}: give fp32, bf16 or fp16"
            ) from error
    _check_asked(asked, user, place, OF_INITIALIZE | {"train_batch_size"})
    _check_kinds(user, place)
    for name, others in READ_BY_KEY.items():
        if isinstance(user.get(name), dict):
            _check_asked(asked[name], user[name], f"{place} {name}:", others)


def _check_asked(asked: _Asked, user: dict, place: str, others: set[str]) -> None:
    """Hold keys and values against what DeepSpeed asked for."""
    known = asked.names | others
    for key, value in user.items():
        if key not in known:
            raise UserError(f"{place} {unknown('key', key, sorted(known), NO_SUCH_KEY)}")
        if value != "auto" and (wanted := _wanted(value, asked.defaults.get(key))):
            raise UserError(f"{place} {key} is {value!r}: give {wanted}")


def _check_kinds(user: dict, place: str) -> None:
    """Hold blocks that models of DeepSpeed's read against the defaults of their fields.

    These models take true for 1, and 1 for true.
    """
    defaults = _fields()
    for key, value in user.items():
        if isinstance(value, dict):
            _check_kinds(value, f"{place} {key}:")
        elif value not in ("auto", None) and (wanted := _wanted(value, defaults.get(key))):
            raise UserError(f"{place} {key} is {value!r}: give {wanted}")


def _wanted(value: Any, default: Any) -> str | None:
    """Say what belongs in the place of a value, by DeepSpeed's default; None where it will do."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float):
        least = min(default, 0)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_number and least <= value < math.inf else f"a number, {least} or more"
    if isinstance(default, str):
        return None if isinstance(value, str) else "text"
    return None


def _first_problem(error: Any, user: dict) -> str:
    """Describe what a model of DeepSpeed's refuses: an unknown key with the nearest known one."""
    problem = error.errors()[0]
    *path, key = (str(part) for part in problem["loc"])
    block = next((name for name, value in user.items() if _leads_to(value, path, key)), error.title)
    place = ": ".join([block, *path])
    if problem["type"] == "extra_forbidden":
        return f"{place}: {unknown('key', key, sorted(_fields().keys() - {key}), NO_SUCH_KEY)}"
    return f"{place}: {key} is {problem['input']!r}: {problem['msg']}"


def _leads_to(value: Any, path: list[str], key: str) -> bool:
    for part in (*path, key):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def _fields() -> dict[str, Any]:
    """Map the keys of all blocks that DeepSpeed has models of to their defaults."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    models = [DeepSpeedConfigModel]
    for model in models:  # it grows
        models += model.__subclasses__()
    fields = [item for model in models for item in model.model_fields.items()]
    return {field.alias or name: field.default for name, field in fields}


class _Asked(dict):
    """A dict, its blocks included, that notes which keys are asked for, and with what default."""

    def __init__(self, entries: dict):
        super().__init__(
            {k: _Asked(v) if isinstance(v, dict) else copy.deepcopy(v) for k, v in entries.items()}
        )
        self.names: set[str] = set()
        self.defaults: dict[str, Any] = {}

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Look a key up."""
        self.names.add(key)
        self.defaults.setdefault(key, default)
        return super().get(key, default)

    def keys(self) -> Any:
        """Stand in for the keys: whether one is among them is noted too."""
        return self

    def __copy__(self) -> _Asked:
        return self

    def __deepcopy__(self, memo: dict) -> _Asked:
        return self
