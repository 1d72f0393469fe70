"""Observers of a run: callbacks that get its figures, in the process that trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar

Observer = Callable[[str, int, Mapping[str, float]], None]  # train or eval, step, figures

_observers: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())


@contextlib.contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Pass what runs log in the block to an observer; an error that it raises ends the run."""
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def tell(kind: str, step: int, figures: Mapping[str, float]) -> None:
    """Pass figures on."""
    for observer in _observers.get():
        observer(kind, step, dict(figures))
