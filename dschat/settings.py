"""Settings: frozen dataclasses that declare every flag once and check themselves in one loop.

A field made by `setting` holds its default, its help, its bounds and choices, and whether a resumed
run may change it. The library takes these objects as they are; `config/cli.py` builds a parser from
them, and `Settings.of(lora_dim=16, ...)` builds one from Python by the flags' names.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Self, TypeVar

from dschat.errors import UserError
from dschat.rules import Kind, Rule

S = TypeVar("S", bound="Settings")


def setting(default: Any, help: str, **rule: Any) -> Any:
    """Declare a field of a `Settings` class; it becomes a flag of the same name.

    Args:
        default: MISSING for a setting that must be given.
        help: what it means. rule: see `Rule`.
    """
    return dataclasses.field(default=default, metadata={"rule": Rule(help, **rule)})


def group(cls: type[Settings], prefix: str = "", **defaults: Any) -> Any:
    """Declare a field that holds a group of settings, whose flags get `prefix` before their names.

    Args:
        defaults: values that replace the group's own defaults; of a group inside it a mapping.
    """
    return dataclasses.field(
        default_factory=lambda: _build(cls, {}, prefix, **defaults),
        metadata={"group": cls, "prefix": prefix, "defaults": defaults},
    )


@dataclass(frozen=True)
class Settings:
    """Base of all settings: every field is checked against its rule when an object is made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "rule" in field.metadata:
                kind, value = type_of(type(self), field.name), getattr(self, field.name)
                if kind.is_tuple and isinstance(value, list):
                    value = tuple(value)
                    object.__setattr__(self, field.name, value)
                field.metadata["rule"].check(field.name, value, kind)

    @classmethod
    def of(cls, **flags: Any) -> Self:
        """Build settings with all their groups from flags by name; the others keep their defaults.

        Raises:
            UserError: an unknown name (with the nearest), a required one missing, a failed check.
        """
        known = [flag.name for flag in flags_of(cls)]
        for name in flags:
            if name not in known:
                raise UserError(unknown("setting", name, known))
        return _build(cls, flags)


@functools.cache
def _types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def type_of(cls: type, name: str) -> Kind:
    """The type of a field: `str | None` is str, `tuple[str, ...]` a tuple of str."""
    hint = _types(cls)[name]
    is_optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if is_optional:
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    is_tuple = typing.get_origin(hint) is tuple
    return Kind(typing.get_args(hint)[0] if is_tuple else hint, is_tuple, is_optional)


@dataclass(frozen=True)
class Flag:
    """One setting by its full name, and its place in a settings object.

    Attributes:
        path: names of the groups from the top, then of the field.
    """

    name: str
    path: tuple[str, ...]
    kind: Kind
    default: Any
    help: str
    rule: Rule

    def value(self, settings: Settings) -> Any:
        """The flag's value in a settings object."""
        return functools.reduce(getattr, self.path, settings)


def flags_of(
    cls: type, prefix: str = "", path: tuple[str, ...] = (), **defaults: Any
) -> list[Flag]:
    """List every flag of a settings class, groups flattened."""
    flags = []
    fields = dataclasses.fields(cls)
    values = {f.name: defaults.get(f.name, f.default) for f in fields}
    for field in fields:
        here, m = (*path, field.name), field.metadata
        if "group" in m:
            inner = m["defaults"] | defaults.get(field.name, {})
            flags += flags_of(m["group"], prefix + m["prefix"], here, **inner)
        elif "rule" in m:
            rule, kind = m["rule"], type_of(cls, field.name)
            help_text = rule.help.format(**values) if "{" in rule.help else rule.help
            flags.append(Flag(prefix + field.name, here, kind, values[field.name], help_text, rule))
    return flags


def flag_values(settings: Settings) -> dict[str, Any]:
    """Map every flag's name to its value in a settings object, retired flags left out."""
    return {
        flag.name: flag.value(settings)
        for flag in flags_of(type(settings))
        if not flag.rule.retired
    }


def given_flags(settings: Settings) -> Iterator[Flag]:
    """List the flags whose value differs from their default."""
    for flag in flags_of(type(settings)):
        if not flag.rule.retired and flag.value(settings) != flag.default:
            yield flag


def unknown(kind: str, name: str, known: Sequence[str], none_near: str = "; see --help") -> str:
    """Say that a name is unknown, and which known one is nearest."""
    near = difflib.get_close_matches(name.split("=")[0], known, n=1)
    return f"unknown {kind} {name}" + (f"; did you mean {near[0]}?" if near else none_near)


def _build(cls: type[S], flags: Mapping[str, Any], prefix: str = "", **defaults: Any) -> S:
    values: dict[str, Any] = dict(defaults)
    for field in dataclasses.fields(cls):
        m, name = field.metadata, prefix + field.name
        if "group" in m:
            inner = m["defaults"] | values.get(field.name, {})
            values[field.name] = _build(m["group"], flags, prefix + m["prefix"], **inner)
        elif "rule" in m and name in flags:
            value = flags[name]
            if m["rule"].bare is not None and isinstance(value, bool):
                value = m["rule"].bare if value else None
            values[field.name] = tuple(value) if isinstance(value, list) else value
            m["rule"].check(name, values[field.name], type_of(cls, field.name))
        elif field.default is MISSING and field.name not in values:
            raise UserError(f"{name} is required")
    return _with_prefix(prefix, {f.name for f in dataclasses.fields(cls)}, lambda: cls(**values))


def _with_prefix(prefix: str, names: set[str], make: Callable[[], S]) -> S:
    """Call `make`; an error that begins with a setting of the group then names its full flag."""
    try:
        return make()
    except UserError as error:
        if prefix and str(error).split(" ")[0].rstrip(":") in names:
            raise UserError(f"{prefix}{error}") from error
        raise
