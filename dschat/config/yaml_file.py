"""Settings in YAML files, as the words of a command line."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dschat.errors import UserError, brief
from dschat.settings import Flag, unknown
from dschat.utils.bounded import TooMuchError, bounded

SHORT = reprlib.Repr()  # of a value in a message: aliases make it as large as they like
SHORT.maxlevel = 2
LARGEST, SECONDS, BYTES = 1_000_000, 10.0, 1e9  # of a file, which has some hundred lines
LONGEST = 100  # of a number, in characters


class _Word(str):
    """A number or a date as it is written, shown as one."""

    def __repr__(self) -> str:
        return str(self)


class _Loader(yaml.SafeLoader):
    """SafeLoader of values as a command line has them.

    A key twice is an error, where YAML takes the last. Numbers stay as they are written: to YAML
    `2024_01_05` is 20240105, `1.10` is 1.1, `2:4:4` is 7444 and `010` is 8.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Build a mapping of distinct keys."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key is a list or a mapping, not a word"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                problem = f"the key {key.value} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _written(loader: _Loader, node: yaml.ScalarNode) -> _Word:
    text = loader.construct_scalar(node)
    if len(text) > LONGEST:
        problem = f"a number of {len(text):,} characters"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return _Word(text)


for _kind in ("int", "float", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _written)


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: with the line of what is wrong.
    """
    try:
        content = _loaded(Path(path))
    except TooMuchError as error:
        raise UserError(f"config {path}: takes {error} to read; write it in short") from error
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"config {path} line {number}: not UTF-8; save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path} line {mark.line + 1}" if mark else path
        raise UserError(f"config {place}: not YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not YAML ({brief(error)})") from error
    except RecursionError as error:
        raise UserError(f"config {path}: nested too deeply") from error
    if not isinstance(content, dict):
        raise UserError(f"config {path}: expected lines of `flag: value`")
    return content


def _loaded(path: Path) -> Any:
    """Load a file of words for a command line: aliases could make it as large as they like."""
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise TooMuchError(f"more than {LARGEST:,} bytes")
    text = content.decode()
    with bounded(SECONDS, BYTES, f"config {path}: reading it does not end; write it in short"):
        return yaml.load(text, _Loader)


def as_words(place: str, content: Mapping[Any, Any], flags: Sequence[Flag]) -> list[str]:
    """Turn a mapping into command-line words, so that both go through the same checks.

    Args:
        place: of the mapping, for messages.

    Raises:
        UserError: an unknown key, with the nearest, or a value of another shape than the flag's.
    """
    by_name = {flag.name: flag for flag in flags}
    tokens: list[str] = []
    for key, value in content.items():
        if key not in by_name:
            raise UserError(f"{place}: {unknown('key', str(key), list(by_name))}")
        if value is not None:
            tokens += _words_of(place, by_name[key], value)
    return tokens


def _words_of(place: str, flag: Flag, value: Any) -> list[str]:
    if flag.kind.element is bool:
        wanted = "true or false"
        if isinstance(value, bool):
            return [f"--{flag.name}"] if value else []
    elif flag.kind.is_tuple and isinstance(value, list):
        if not any(isinstance(item, (bool, dict, list, set)) for item in value):
            return [f"--{flag.name}", *map(str, value)]
        wanted = "a list of single values, with words such as yes and no in quotes"
    else:
        wanted = "values" if flag.kind.is_tuple else "one value"
        if not isinstance(value, (bool, dict, list, set)):
            return [f"--{flag.name}={value}"]
    raise UserError(f"{place}: {flag.name} is {SHORT.repr(value)}, expected {wanted}")
