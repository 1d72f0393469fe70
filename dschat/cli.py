"""Dataclasses to command line or YAML: builds the parser, names what is nearest, reports errors."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from tqdm import tqdm

from dschat.errors import UserError
from dschat.utils.distributed import launched_rank, print_rank_0

Settings = TypeVar("Settings")
SWITCH = {"action": "store_true"}  # options of a flag without a value


def flag(default: Any, help: str, *, retired: bool = False, **argparse_options: Any) -> Any:
    """A dataclass field that is a command-line flag of the same name.

    `help` may hold fields like {full_rate}: other fields of the same group. A `retired` flag is
    accepted, does nothing, and says so once; its help says why.
    """
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else None
    stored = factory or {"default": default}
    metadata = {"help": help, "options": argparse_options, "retired": retired}
    return dataclasses.field(**stored, metadata=metadata)


def group(cls: type, prefix: str = "", **defaults: Any) -> Any:
    """A dataclass field that holds a group of flags, each named with `prefix`.

    `defaults` replace the group's own.
    """
    return dataclasses.field(
        default=None, metadata={"group": cls, "prefix": prefix, "defaults": defaults}
    )


@dataclasses.dataclass(frozen=True)
class Flag:
    """One command-line flag and the place of its value in the settings."""

    name: str
    path: tuple[str, ...]
    field: dataclasses.Field
    default: Any
    help: str

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flag; the default stays out of the namespace unless given."""
        options = dict(self.field.metadata["options"])
        if "action" not in options and "type" not in options:
            options["type"] = type(self.default)
        text = self.help.replace("%", "%%")
        if self.default not in (None, False, dataclasses.MISSING) and "default" not in text:
            text += f" (default: {self.default})"
        parser.add_argument(
            f"--{self.name}", dest=self.name, default=argparse.SUPPRESS, help=text, **options
        )


def flags_of(
    cls: type, prefix: str = "", path: tuple[str, ...] = (), **defaults: Any
) -> list[Flag]:
    """Every flag of a settings class, groups flattened."""
    flags = []
    fields = dataclasses.fields(cls)
    values = {f.name: defaults.get(f.name, _default(f)) for f in fields}
    for field in fields:
        here, m = (*path, field.name), field.metadata
        if "group" in m:
            flags += flags_of(m["group"], prefix + m["prefix"], here, **m["defaults"])
        elif "help" in m:
            text = m["help"].format(**values)
            flags.append(Flag(prefix + field.name, here, field, values[field.name], text))
    return flags


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def flag_values(settings: Any) -> dict[str, Any]:
    """The value of every flag of a settings object by the flag's name, retired ones left out."""
    values = {}
    for item in flags_of(type(settings)):
        if not item.field.metadata["retired"]:
            value = settings
            for name in item.path:
                value = getattr(value, name)
            values[item.name] = value
    return values


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, raised as UserError."""

    def error(self, message: str) -> NoReturn:
        """What argparse calls on bad usage."""
        raise UserError(message)


def parse(cls: type[Settings], argv: Sequence[str] | None, description: str) -> Settings:
    """Build settings from `--config FILE.yaml`, where given, and the command line, which wins.

    Raises:
        UserError: an unknown flag or key (with the nearest name), a wrong type, a failed check.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = flags_of(cls)
    parser = OneLineParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file of flag: value; the command line wins")
    for item in flags:
        item.add_to(parser)
    yaml_path = parser.parse_known_args([*_only(argv, "--config")])[0].config
    names = [f.name for f in flags]
    from_yaml = _yaml_argv(yaml_path, flags) if yaml_path else []
    # Two passes, lest a word in front of the first flag join a list that the file ends with.
    try:
        from_file = parser.parse_args(from_yaml)
    except UserError as error:
        raise UserError(f"config {yaml_path}: {error}") from error
    namespace, unknown = parser.parse_known_args(argv, from_file)
    if unknown:
        raise UserError(_unknown("flag", unknown[0], [f"--{n}" for n in names]))
    for item in flags:
        if item.name in namespace and item.field.metadata["retired"]:
            print_rank_0(f"--{item.name} does nothing: {item.help}", launched_rank())
    return _build(cls, vars(namespace))


def _only(argv: list[str], name: str) -> list[str]:
    for i, token in enumerate(argv):
        if token == name or token.startswith(name + "="):
            return argv[i : i + (1 if "=" in token else 2)]
    return []


def _unknown(kind: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.split("=")[0], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; see --help"
    return f"unknown {kind} {name}{hint}"


def _yaml_argv(path: str, flags: list[Flag]) -> list[str]:
    """A YAML mapping as command-line tokens, so that both go through the same checks."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise UserError(f"config {path}: expected lines of `flag: value`")
    by_name = {f.name: f for f in flags}
    tokens: list[str] = []
    for key, value in content.items():
        if key not in by_name:
            raise UserError(f"config {path}: {_unknown('key', str(key), list(by_name))}")
        if value is not None:
            tokens += _yaml_tokens(path, key, value, by_name[key].field.metadata["options"])
    return tokens


def _yaml_tokens(path: str, key: str, value: Any, options: dict[str, Any]) -> list[str]:
    if options.get("action") == "store_true":
        wanted = "true or false"
        if isinstance(value, bool):
            return [f"--{key}"] if value else []
    elif "nargs" in options and isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    else:
        wanted = "values" if "nargs" in options else "one value"
        if not isinstance(value, (bool, dict, list)):
            return [f"--{key}={value}"]
    raise UserError(f"config {path}: {key} is {value!r}, expected {wanted}")


def _build(cls: type[Settings], given: dict[str, Any], prefix: str = "", **defaults) -> Settings:
    values = {}
    for field in dataclasses.fields(cls):
        m = field.metadata
        if "group" in m:
            values[field.name] = _build(m["group"], given, prefix + m["prefix"], **m["defaults"])
        else:
            fallback = defaults.get(field.name, _default(field))
            values[field.name] = given.get(prefix + field.name, fallback)
            if values[field.name] is dataclasses.MISSING:
                raise UserError(f"--{prefix}{field.name} is required")
    return cls(**values)


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry point; a UserError becomes one line on stderr (rank 0) and exit code 2."""
    try:
        main()
    except UserError as error:
        if launched_rank() == 0:
            tqdm.write(f"error: {error}", file=sys.stderr)  # on a line of its own, behind any bar
            sys.stderr.flush()
        sys.exit(2)
