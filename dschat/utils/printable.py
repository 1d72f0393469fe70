"""Text from outside, made fit for a terminal: what would steer it is shown, not sent."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from dschat.utils.launchers import rank_of

# Control characters (C0, delete, C1), line and paragraph separators, marks that embed, override or
# isolate a direction of writing, and halves of surrogate pairs, which no stream can encode.
_STEERING = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "\n\t") -> str:
    """Escape as Python does what a terminal obeys or cannot show: ESC becomes the text `\\x1b`.

    Args:
        keep: characters that stay as they are.
    """
    return _STEERING.sub(lambda m: m[0] if m[0] in keep else _escaped(m[0]), text)


def code_span(text: str) -> str:
    """Show a text from outside in Markdown as it is, on one line; nothing in it is markup."""
    return f"`{printable(text, keep='').replace('`', chr(39))}`"


# Columns of the window in which a launcher shows what this process prints.
WINDOW = "DSCHAT_WINDOW"


def window() -> int | None:
    """Columns of the terminal that standard output is, or ends in; None where there is none."""
    if sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    columns = os.environ.get(WINDOW, "")
    return int(columns) if columns.isdecimal() and int(columns) else None


def fitted(text: str, columns: int | None) -> str:
    """Break lines that a window cuts: of figures, `a 1 | b 2, c 3`, after `|` or a comma.

    Args:
        columns: of the window; None leaves all as it is.
    """
    if columns is None or len(text) <= columns:
        return text
    return "\n".join(_broken(line, columns) for line in text.split("\n"))


def cut(line: str, columns: int | None) -> str:
    """Shorten a line that a window cuts; its end becomes an ellipsis.

    Args:
        columns: of the window; None leaves it as it is.
    """
    return line if columns is None or len(line) <= columns else line[: columns - 1] + "…"


def aligned(rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """Make lines of the rows of a table; all columns but the first ones, of texts, end alike."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < texts else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _broken(line: str, columns: int) -> str:
    if len(line) <= columns:
        return line
    if " | " not in line:
        wrapper = textwrap.TextWrapper(
            columns,
            subsequent_indent="  ",
            expand_tabs=False,
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return wrapper.fill(line)
    lines = [""]
    for figure in re.split(r"(?<= \|) |(?<=,) ", line):
        longer = f"{lines[-1]} {figure}" if lines[-1] else figure
        if len(longer) > columns and lines[-1]:
            lines.append(f"  {figure}")
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class _Record(logging.LogRecord):
    """A record of any library whose message is printable."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; end at once inside an import, whose code may swallow or abort at it.

    Torch's C++ ends by `std::terminate` at a Python error that it did not expect.
    """
    while frame is not None:
        code = frame.f_code
        if (code.co_filename, code.co_name) == ("<frozen importlib._bootstrap>", "_find_and_load"):
            last_line("interrupted")
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        frame = frame.f_back
    raise KeyboardInterrupt


def _show_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):  # the interpreter ends as SIGINT would have ended it
        last_line("interrupted")
        return
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))


def _show_threads_error(args: threading.ExceptHookArgs) -> None:
    """Show what ended a thread; TensorBoard's keeps that for its next caller, who says it."""
    if args.exc_value is not None and not type(args.thread).__module__.startswith("tensorboard."):
        _show_error(args.exc_type, args.exc_value, args.exc_traceback)


_format_warning = warnings.formatwarning


def _show_warning(*args: Any, **options: Any) -> str:
    return printable(_format_warning(*args, **options))


VERBOSE = "--verbose"  # of a command line: what libraries say is shown


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out that DeepSpeed finds no GPU on a machine that has none."""
    is_old = "Setting accelerator to CPU" in str(record.msg) and not shutil.which("nvidia-smi")
    return VERBOSE in sys.argv or not is_old


def step_of_start(text: str) -> None:
    """Say on a terminal what takes the next seconds, before the first line of a run."""
    if window() is not None and rank_of(os.environ) == 0:
        print(fitted(text, window()), flush=True)


NOISY = (
    "transformers",
    "datasets",
    "bitsandbytes",
    "huggingface_hub",
    "torch",
    "accelerate",
    "matplotlib",
)


def guard_terminal() -> None:
    """Make printable what other libraries print by themselves, and leave out all but errors.

    With --verbose, or Python's own -W, nothing is left out. Torch's C++ must not be imported yet:
    it warns of a connection whose other end has gone, which `rank_watch` says, with its stack.
    From here Ctrl-C, unless it has a handler, ends the program also while it imports.
    """
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    if VERBOSE not in sys.argv:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _show_warning
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):
        signal.signal(signal.SIGINT, _interrupt)
    sys.excepthook = _show_error
    threading.excepthook = _show_threads_error


def last_line(line: str) -> None:
    """Print a process's last line, below any progress bar; nowhere, where nothing takes it."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    above = "\n" if bars is not None and len(getattr(bars, "_instances", [])) else ""
    with contextlib.suppress(OSError):  # a full disk, a closed pipe: the process has yet to end
        os.write(2, f"{above}{line}\n".encode())
