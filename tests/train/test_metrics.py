"""Console lines and the writers of figures."""

import json
import math
import sys
from contextlib import closing
from types import ModuleType, SimpleNamespace

import pytest

from dschat.errors import UserError
from dschat.train.metrics import LogConfig, MetricLogger, console_line, format_value, progress_bar
from dschat.train.trackers import TRACKERS
from dschat.utils.printable import WINDOW


def logger_in(folder, rank: int = 0, **settings: object) -> closing[MetricLogger]:
    return closing(MetricLogger(LogConfig(**settings), folder, rank))


def read(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3e-5, "3.0e-05"),
        (0.00965, "0.00965"),
        (1.23456, "1.235"),
        (-0.5, "-0.5"),
        (0, "0"),
        (2.0, "2"),
        (12345.6, "12,346"),
        (123456, "123,456"),
        (1e-3, "0.001"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_format_value(value, text):
    assert format_value(value) == text


def test_console_line_keeps_the_order():
    assert (
        console_line(10, 200, {"loss": 1.25, "lr": 3e-5}) == "step 10/200 | loss 1.25 | lr 3.0e-05"
    )
    assert console_line(7, None, {}) == "step 7"


def test_jsonl_one_object_a_line(tmp_path):
    with logger_in(tmp_path / "new") as logger:
        logger.log(1, {"loss": 2.5, "accuracy": 0.5})
        logger.log(1, {"loss": math.nan, "a": math.inf, "b": -math.inf}, kind="eval")
        # Readable before the end: a run may be killed.
        assert len(read(tmp_path / "new")) == 2
    first, second = read(tmp_path / "new")
    assert list(first.items()) == [("kind", "train"), ("step", 1), ("accuracy", 0.5), ("loss", 2.5)]
    assert second == {"kind": "eval", "step": 1, "a": "inf", "b": "-inf", "loss": "nan"}


def test_each_run_has_a_file_of_its_own(tmp_path):
    for step in (1, 2, 3):
        with logger_in(tmp_path) as logger:
            logger.log(step, {"loss": 1.0})
    assert [r["step"] for r in read(tmp_path)] == [3]
    for number, step in ((1, 1), (2, 2)):
        kept = (tmp_path / f"metrics.{number}.jsonl").read_text()
        assert json.loads(kept)["step"] == step


def test_other_ranks_write_nothing(tmp_path):
    with logger_in(tmp_path, rank=1) as logger:
        logger.log(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_figure_named_step_is_refused(tmp_path):
    with (
        logger_in(tmp_path) as logger,
        pytest.raises(ValueError, match="'step'"),
    ):
        logger.log(1, {"step": 3.0})


@pytest.mark.parametrize(
    "package, setting",
    [
        ("tensorboard", {"enable_tensorboard": True}),
        ("wandb", {"wandb_project": "x"}),
        ("trackio", {"trackio_project": "x"}),
        *((name, {"report_to": [name]}) for name in TRACKERS),
    ],
)
def test_missing_package_is_named(monkeypatch, package, setting):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{next(iter(setting))}: .*`pip install {package}`"):
        LogConfig(**setting)


def fake_module(monkeypatch, name: str, **members) -> None:
    module = ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def seen(monkeypatch) -> list:
    """What fakes of the three packages were called with; all of them are there."""
    heard: list = []

    def writer(log_dir):
        heard.append(("tensorboard", log_dir))
        add = lambda *scalar: heard.append(scalar)  # noqa: E731
        close = lambda: heard.append("closed")  # noqa: E731
        return SimpleNamespace(add_scalar=add, flush=lambda: None, close=close)

    def init(**kwargs):
        heard.append(("wandb", kwargs))
        return SimpleNamespace(log=heard.append, finish=lambda: heard.append("finished"))

    def begin(project):
        print("* Trackio greets you")
        heard.append(("trackio", project))
        log = lambda figures, step: heard.append((step, figures))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: heard.append("kept"))

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    fake_module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=writer)
    fake_module(monkeypatch, "wandb", init=init)
    fake_module(monkeypatch, "trackio", init=begin)
    return heard


def test_tensorboard_wandb_and_trackio_get_the_same_figures(tmp_path, seen, capsys):
    with logger_in(tmp_path, report_to=list(TRACKERS), tensorboard_path="tb") as logger:
        logger.log(3, {"loss": 0.5, "kl": 0.1}, kind="eval")
    assert seen == [
        ("tensorboard", "tb"),
        ("wandb", {"project": None, "dir": str(tmp_path)}),
        ("trackio", "dschat"),
        *(("eval/kl", 0.1, 3), ("eval/loss", 0.5, 3)),
        {"step": 3, "eval/kl": 0.1, "eval/loss": 0.5},
        (3, {"eval/kl": 0.1, "eval/loss": 0.5}),
        *("kept", "finished", "closed"),
    ]
    out = capsys.readouterr().out
    assert "Trackio greets" not in out and "trackio show --project dschat" in out


def test_a_project_or_the_older_flag_asks_for_them_too(tmp_path, seen):
    flags = {"enable_tensorboard": True, "wandb_project": "p", "trackio_project": "q"}
    with logger_in(tmp_path, report_to=["wandb"], **flags):
        pass
    assert {name: value for name, value in seen[:3]} == {
        "tensorboard": "tensorboard",
        "wandb": {"project": "p", "dir": str(tmp_path)},
        "trackio": "q",
    }
    with logger_in(tmp_path / "other", rank=1, report_to=["trackio"]):
        pass
    assert len(seen) == 6  # three were begun and ended


def test_a_service_that_fails_ends_no_run(tmp_path, seen, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise ConnectionError("no\x1b network\nat all")

    with logger_in(tmp_path, report_to=["wandb", "trackio"]) as logger:
        monkeypatch.setattr(logger._trackers["wandb"]._run, "log", fails)
        monkeypatch.setattr(logger._trackers["trackio"]._run, "finish", fails)
        for step in (1, 2):
            logger.log(step, {"loss": 0.5})
    assert [figures for figures in seen if figures == (2, {"train/loss": 0.5})]
    why, lines = "(ConnectionError: no\\x1b network)", capsys.readouterr().out.splitlines()
    assert lines[1] == f"wandb: gets no more figures {why}; metrics.jsonl has them all"
    assert lines[-1] == f"trackio: did not finish {why}" and len(lines) == 4
    assert [record["step"] for record in read(tmp_path)] == [1, 2]
    monkeypatch.setattr("wandb.init", fails)
    with pytest.raises(UserError, match="report_to: wandb takes no run"):
        MetricLogger(LogConfig(report_to=("wandb",)), tmp_path, 0)


def test_the_bar_of_rank_0_alone_is_shown(tmp_path, capsys):
    for rank in (1, 0):
        with logger_in(tmp_path, rank=rank) as logger:
            bar = progress_bar(2, "train", logger)
            bar.update()
            bar.set_postfix_str("loss 1")
            bar.close()
        shown = capsys.readouterr().err
        assert ("train:  50%" in shown) == (rank == 0)
        assert bool(shown) == (rank == 0)


def test_a_bar_that_ends_in_a_window_fits_it(tmp_path, capsys, monkeypatch):
    """Behind a launcher a process writes into a pipe, whose other end is the terminal."""
    widths = []
    for columns in ("60", ""):
        monkeypatch.setenv(WINDOW, columns)
        with logger_in(tmp_path) as logger:
            bar = progress_bar(2, "train", logger)
            bar.update()
            bar.set_postfix_str(
                "loss 0.3147, lr/decay 7.7e-09, lr/no_decay 7.7e-09, tokens/s 16,094"
            )
            bar.close()
        widths.append(max(len(line) for line in capsys.readouterr().err.splitlines()))
    assert widths[0] == 59 and widths[1] > 80


@pytest.mark.parametrize("columns", [40, 70, 80, 120, 200])
def test_figures_behind_a_bar_are_never_cut(columns, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(WINDOW, str(columns))
    with logger_in(tmp_path) as logger:
        bar = progress_bar(1000, "train", logger)
        bar.start_t -= 10.0
        bar.last_print_t -= 10.0
        bar.update(250)
        bar.show({"loss": 0.31472, "lr/decay": 7.7e-9, "tokens/s": 16094.4})
        bar.close()
    line = capsys.readouterr().err.splitlines()[-1]
    figures = ["loss 0.3147", "lr/decay 7.7e-09", "tokens/s 16,094"]
    shown = [figure for figure in figures if f", {figure}" in line]
    assert shown == figures[: len(shown)] and shown and len(line) < columns, line
    assert line.count(", ") == 1 + len(shown) and "250/1000" in line, line
    assert (len(shown) == 3) == (columns >= 120), line


def test_who_watches_a_bar_waits_five_seconds_at_most(tmp_path, monkeypatch):
    """Of a log a line each ten seconds will do."""
    for columns, at_most in (("80", 5.0), ("", 10.0)):
        monkeypatch.setenv(WINDOW, columns)
        with logger_in(tmp_path) as logger:
            bar = progress_bar(2, "train", logger)
            assert bar.mininterval == bar.fp._every <= at_most
            bar.close()
