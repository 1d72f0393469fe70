"""Settings from the command line or a YAML file; every error is one line."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from dschat.config.failures import line_for
from dschat.config.help import flag_parser
from dschat.config.paths import check_paths
from dschat.config.yaml_file import as_words, read_yaml
from dschat.errors import UserError
from dschat.settings import Settings, flags_of, type_of, unknown
from dschat.train import run_lock, signals
from dschat.utils import rank_watch
from dschat.utils.distributed import barrier, launched_rank, print_rank_0
from dschat.utils.printable import guard_terminal, last_line, printable, step_of_start

S = TypeVar("S", bound=Settings)
RANK_0_FIRST = 5.0  # seconds in which rank 0 says an error that all ranks meet, and ends them


def parse(
    cls: type[S],
    argv: Sequence[str] | None,
    description: str | None,
    recorded: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> S:
    """Build settings from `--config FILE.yaml`, where given, and the command line, which wins.

    Args:
        recorded: makes values of flags that are not given from those that are.

    Raises:
        UserError: an unknown flag or key (with the nearest name), a wrong type, a failed check.
    """
    given = _given(cls, argv, description)
    if recorded is not None:
        given = {**recorded(given), **given}
    for flag in flags_of(cls):
        if flag.name in given and flag.rule.retired:
            print_rank_0(f"--{flag.name} does nothing: {flag.help}", launched_rank())
    return cls.of(**given)


def check_flags(
    cls: type[Settings], description: str | None, argv: Sequence[str] | None = None
) -> None:
    """Exit at `--help`, wrong flags and missing files, as `run_cli(main)` would.

    Programs call it before the imports of what they run, which take seconds: a fifth less where
    nobody looks for garbage among what they make, which stays. `run_cli` looks for it again.
    """
    guard_terminal()
    try:
        with _one_line():
            check_paths(cls.of(**_given(cls, argv, description)))
    except SystemExit:
        signals.restore()
        raise
    step_of_start("starting: libraries, then the checks")
    gc.disable()


def _given(
    cls: type[Settings], argv: Sequence[str] | None, description: str | None
) -> dict[str, Any]:
    """Read the flags that the command line and its YAML file give."""
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = flags_of(cls)
    parser = flag_parser(cls, description)
    yaml_path = parser.parse_known_args([*_only(argv, "--config")])[0].config
    from_yaml: list[str] = []
    if yaml_path:
        from_yaml = as_words(f"config {yaml_path}", read_yaml(yaml_path), flags)
    # Two passes, so that a word before the first flag cannot join a list that the file ends with.
    try:
        from_file = parser.parse_args(from_yaml)
    except UserError as error:
        raise UserError(f"config {yaml_path}: {error}") from error
    namespace, extra = parser.parse_known_args(argv, from_file)
    given = vars(namespace)
    name, _ = getattr(cls, "WORDS", (None, None))
    if name is not None and extra and not any(word.startswith("-") for word in extra):
        if f"--{name}" in argv:
            raise UserError(f"--{name} and {extra[0]}: both name {name}; drop one")
        if type_of(cls, name).is_tuple:
            given[name], extra = extra, []
        else:
            given[name], *extra = extra
    if extra:
        wrong = next((word for word in extra if word.startswith("-")), extra[0])
        raise UserError(unknown("flag", wrong, [f"--{flag.name}" for flag in flags]))
    del given["config"]
    return given


def _only(argv: list[str], name: str) -> list[str]:
    for i, token in enumerate(argv):
        if token == name or token.startswith(name + "="):
            return argv[i : i + (1 if "=" in token else 2)]
    return []


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry point; what ends it early is one line on stderr (rank 0), and its exit code.

    A UserError ends with 2, a stop by a signal with 75; a rank that is lost, and memory or a disk
    that runs out, with 1 and a line of the rank that it happens to.
    """
    guard_terminal()
    if not gc.isenabled():  # what was imported since `check_flags` is passed over from here on
        gc.freeze()
        gc.enable()
    try:
        with _one_line():
            main()
            _leave_together()
    finally:
        rank_watch.stop()
        run_lock.release()
        signals.restore()


def _leave_together() -> None:
    """Release the output folder while the other ranks wait: a rank lost here is noticed."""
    run_lock.release()
    if rank_watch.is_on():
        barrier("the last barrier", patient=True)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """End the process with a line and an exit code where the block meets a known error."""
    try:
        yield
    except UserError as error:
        _say(f"error: {error}")
        if _rank() != 0 and not rank_watch.is_on():
            signals.restore()  # beside rank 0 it ends without a word
            time.sleep(RANK_0_FIRST)
            _say(f"error: rank {_rank()}: {error}", everywhere=True)
        rank_watch.tell(printable(f"error: {error}", keep=""), 2)  # it may be this rank's alone
        sys.exit(2)
    except signals.Stopped as stop:
        for bar in list(getattr(tqdm, "_instances", [])):
            bar.close()  # else it would draw itself once more, below the line
        _say(stop.line)
        signals.ignore_at_exit()
        sys.exit(signals.report_exit(signals.STOPPED))
    except rank_watch.LostRankError as error:
        last_line(f"error: {error}")
        sys.exit(rank_watch.LOST)
    except Exception as error:
        lost = rank_watch.explain(error)
        if lost is not None:
            if lost:
                last_line(f"error: {lost}; the run ends")
            os._exit(rank_watch.LOST)  # the libraries would wait for the lost rank
        known = line_for(error)
        if known is None:
            raise
        _say(f"error: rank {_rank()}, {known}", everywhere=True)
        sys.exit(1)


def _rank() -> int:
    try:
        return launched_rank()
    except UserError:  # a number that is none; it ends every process
        return 0


def _say(line: str, everywhere: bool = False) -> None:
    if everywhere or _rank() == 0:
        line = printable(line, keep="")
        with contextlib.suppress(OSError):  # where nothing takes it, the exit code says it
            tqdm.write(line, file=sys.stderr)  # on a line of its own, after any bar
            sys.stderr.flush()
