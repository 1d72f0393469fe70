"""Run a program's file in this process, as `python FILE` would."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def run_file(file: str | Path) -> None:
    """Run a file as the module `__main__`; sys.argv stays as it is, and may name a command.

    Unlike `runpy.run_path`, which puts the file into sys.argv, and takes the module away before
    what the program leaves to the end of the process runs.
    """
    spec = importlib.util.spec_from_file_location("__main__", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules["__main__"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
