"""Files and folders that a command line names, looked for before the slow imports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dschat.data.names import is_spelt_as_path
from dschat.errors import UserError
from dschat.settings import Settings, flags_of

DATA = "data_path"
MODELS = ("model_name_or_path", "actor_model_name_or_path", "path")


def check_paths(settings: Settings) -> None:
    """Refuse a path of data, or of the first model, where nothing is.

    Raises:
        UserError: in the words of what reads them later.
    """
    for flag, name in _named(settings):
        is_there = Path(name).expanduser().exists()
        if flag == DATA and is_spelt_as_path(name) and not is_there:
            raise UserError(f"{DATA} {name}: no such file or folder; check the path")
        if flag in MODELS and name.startswith((".", os.sep, "~")) and not is_there:
            raise UserError(
                f"tokenizer {name!r} is not a folder: give a folder that holds tokenizer.json, "
                "or the name of a model on the Hub"
            )


def _named(settings: Settings) -> Iterator[tuple[str, str]]:
    for flag in flags_of(type(settings)):
        value = flag.value(settings)
        if flag.name == DATA:
            yield from ((DATA, name) for name in value)
        elif flag.name in MODELS and value is not None:
            yield flag.name, str(value)
