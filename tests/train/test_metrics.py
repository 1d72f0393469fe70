"""Means, console lines and the writers of figures."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest

from dschat.errors import UserError
from dschat.train.metrics import (
    Mean,
    MetricLogger,
    collect,
    console_line,
    format_value,
    progress,
)


def read(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]


def test_mean_weighs_by_count():
    mean = Mean()
    mean.add(6.0, 3)  # three tokens of loss 2
    mean.add(5.0, 1)
    assert mean.value == 2.75  # not (2 + 5) / 2
    mean.reset()
    assert math.isnan(mean.value)


def test_mean_over_ranks_is_the_mean_of_all_tokens():
    other_rank = [10.0, 1.0]
    mean = Mean(reduce=lambda local: [a + b for a, b in zip(local, other_rank, strict=True)])
    mean.add(2.0, 3)
    assert mean.value == 3.0  # (2 + 10) / (3 + 1)
    assert (mean.total, mean.count) == (2.0, 3.0)  # reading it does not change this rank's part


def test_collect_sums_all_names_in_one_call_whatever_their_order():
    calls = []

    def reduce(flat):
        calls.append(flat)
        return [2 * x for x in flat]

    loss, accuracy = Mean(), Mean()
    loss.add(6, 4)
    accuracy.add(3, 4)
    assert collect({"loss": loss, "accuracy": accuracy}, reduce) == {"loss": 1.5, "accuracy": 0.75}
    assert list(collect({"loss": loss, "accuracy": accuracy})) == ["loss", "accuracy"]
    collect({"accuracy": accuracy, "loss": loss}, reduce)
    assert calls == [[3, 4, 6, 4]] * 2


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
    with MetricLogger(tmp_path / "new", enabled_rank0=True) as logger:
        logger.log(1, {"loss": 2.5, "accuracy": 0.5})
        logger.log(1, {"loss": math.nan, "a": math.inf, "b": -math.inf}, kind="eval")
        # Readable before the end: a run may be killed.
        assert len(read(tmp_path / "new")) == 2
    first, second = read(tmp_path / "new")
    assert list(first.items()) == [("kind", "train"), ("step", 1), ("accuracy", 0.5), ("loss", 2.5)]
    assert second == {"kind": "eval", "step": 1, "a": "inf", "b": "-inf", "loss": "nan"}


def test_each_run_has_a_file_of_its_own(tmp_path):
    for step in (1, 2, 3):
        with MetricLogger(tmp_path, enabled_rank0=True) as logger:
            logger.log(step, {"loss": 1.0})
    assert [r["step"] for r in read(tmp_path)] == [3]
    for number, step in ((1, 1), (2, 2)):
        kept = (tmp_path / f"metrics.{number}.jsonl").read_text()
        assert json.loads(kept)["step"] == step


def test_other_ranks_write_nothing(tmp_path):
    with MetricLogger(tmp_path, enabled_rank0=False) as logger:
        logger.log(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_figure_named_step_is_refused(tmp_path):
    with (
        MetricLogger(tmp_path, enabled_rank0=True) as logger,
        pytest.raises(ValueError, match="'step'"),
    ):
        logger.log(1, {"step": 3.0})


@pytest.mark.parametrize("rank0", [True, False])
@pytest.mark.parametrize(
    ("package", "option"), [("tensorboard", "tensorboard_dir"), ("wandb", "wandb_project")]
)
def test_missing_package_is_named_on_every_rank(tmp_path, monkeypatch, package, option, rank0):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        MetricLogger(tmp_path, enabled_rank0=rank0, **{option: "x"})
    assert list(tmp_path.iterdir()) == []


def fake_module(monkeypatch, name: str, **members) -> None:
    module = ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_and_wandb_get_the_same_figures(tmp_path, monkeypatch):
    seen = []

    def writer(log_dir):
        seen.append(("dir", log_dir))
        add = lambda *scalar: seen.append(scalar)  # noqa: E731
        return SimpleNamespace(add_scalar=add, close=lambda: seen.append("closed"))

    def init(**kwargs):
        seen.append((kwargs["project"], kwargs["name"]))
        return SimpleNamespace(log=seen.append, finish=lambda: seen.append("finished"))

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    fake_module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=writer)
    fake_module(monkeypatch, "wandb", init=init)
    options = {"tensorboard_dir": tmp_path / "tb", "wandb_project": "p", "run_name": "r"}
    with MetricLogger(tmp_path, enabled_rank0=True, **options) as logger:
        logger.log(3, {"loss": 0.5}, kind="eval")
    assert seen == [
        ("dir", str(tmp_path / "tb")),
        ("p", "r"),
        ("eval/loss", 0.5, 3),
        {"step": 3, "eval/loss": 0.5},
        "closed",
        "finished",
    ]


def test_progress_yields_all_and_can_be_silent(capsys):
    assert list(progress(range(3), desc="loud", enabled=True)) == [0, 1, 2]
    assert "loud: 100%" in capsys.readouterr().err
    bar = progress(total=2, desc="quiet", enabled=False)
    bar.update()
    bar.set_postfix_str("loss 1")
    bar.close()
    assert capsys.readouterr().err == ""
