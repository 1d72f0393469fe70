"""Packages that take seconds to import, each imported when something of it is first used.

    from dschat.lazy import torch

It is what `lazy import torch` of PEP 810 will be. Settings stand beside the code that uses them;
with these names in place of plain imports the settings of a program, and so `--help` and the checks
of its flags, need none of the packages. A module that derives a class from one of them, or is not
imported for settings, imports it as usual.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.distributed as dist
else:

    class _Lazy:
        """Stands for a module: what is read from it or set on it goes to the module itself."""

        __slots__ = ("_name",)

        def __init__(self, name: str):
            object.__setattr__(self, "_name", name)

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

        def __setattr__(self, attribute: str, value: Any) -> None:
            setattr(importlib.import_module(self._name), attribute, value)

        def __delattr__(self, attribute: str) -> None:
            delattr(importlib.import_module(self._name), attribute)

    np, torch, dist = _Lazy("numpy"), _Lazy("torch"), _Lazy("torch.distributed")

__all__ = ["dist", "np", "torch"]
