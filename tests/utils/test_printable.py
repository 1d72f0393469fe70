"""Lines of figures in a window."""

import logging
import sys
import warnings

import pytest

from dschat.utils.printable import WINDOW, cut, fitted, guard_terminal, step_of_start

EVALUATION = "eval step 0/6 | loss 0.6931 | accuracy 0.5 | margin 0 | logprob_chosen -4.264"


def test_figures_are_broken_where_the_window_ends_and_stay_whole():
    assert fitted(EVALUATION, 40) == (
        "eval step 0/6 | loss 0.6931 |\n  accuracy 0.5 | margin 0 |\n  logprob_chosen -4.264"
    )
    speed = "End-to-end 8.8 s, 14.49 samples/s | Generation 1.686 s, 1,737 tokens"
    assert fitted(speed, 30) == (
        "End-to-end 8.8 s,\n  14.49 samples/s |\n  Generation 1.686 s,\n  1,737 tokens"
    )


def test_what_fits_stays_and_other_lines_are_broken_between_words():
    assert fitted(EVALUATION, len(EVALUATION)) == EVALUATION == fitted(EVALUATION, None)
    text = "a text of an answer that is longer than the window"
    assert fitted(text, 22) == "a text of an answer\n  that is longer than\n  the window"
    assert (
        fitted("/a/path/that-is/wider-than/the-window", 10)
        == "/a/path/that-is/wider-than/the-window"
    )
    assert fitted(f"{text}\n{EVALUATION}", 60).startswith(f"{text}\neval step 0/6 | loss")
    assert fitted("one_name_that_is_wider_than_all | b 1", 10) == (
        "one_name_that_is_wider_than_all |\n  b 1"
    )


def test_a_machine_without_a_gpu_is_no_news(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back what the guard replaces
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory = logging.getLogRecordFactory()
    guard_terminal()
    logging.setLogRecordFactory(factory)
    line = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable"
    logger, heard = logging.getLogger("DeepSpeed"), []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    try:
        monkeypatch.setattr("shutil.which", lambda name: None)
        logger.warning(line)
        logger.warning("something else")
        monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
        logger.warning(line)  # there is a GPU, and torch does not see it
    finally:
        logger.removeHandler(handler)
    assert heard == ["something else", line]


def test_what_takes_seconds_is_said_on_a_terminal_alone(monkeypatch, capsys):
    for columns, rank, said in (("80", "0", "starting\n"), ("80", "1", ""), ("", "0", "")):
        monkeypatch.setenv(WINDOW, columns)
        monkeypatch.setenv("RANK", rank)
        step_of_start("starting")
        assert capsys.readouterr().out == said
    monkeypatch.setenv(WINDOW, "40")
    step_of_start("starting: libraries, then the checks of all steps")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40


@pytest.mark.parametrize("verbose", [True, False])
def test_libraries_are_heard_with_verbose_alone(monkeypatch, verbose):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "argv", ["dschat sft", *(["--verbose"] if verbose else [])])
    monkeypatch.setattr(sys, "warnoptions", [])
    factory, logger = logging.getLogRecordFactory(), logging.getLogger("bitsandbytes.backends.cpu")
    parent = logging.getLogger("bitsandbytes")
    level = parent.level
    try:
        with warnings.catch_warnings(record=True) as heard:
            parent.setLevel(logging.NOTSET)
            guard_terminal()
            warnings.warn("old", FutureWarning, stacklevel=1)
        assert logger.isEnabledFor(logging.WARNING) == verbose
        assert bool(heard) == verbose and logger.isEnabledFor(logging.ERROR)
    finally:
        parent.setLevel(level)
        logging.setLogRecordFactory(factory)


def test_a_line_is_cut_to_the_window_where_there_is_one():
    assert cut("abcdef", 6) == "abcdef" and cut("abcdefg", 6) == "abcde…"
    assert cut("abcdefg", None) == "abcdefg"
