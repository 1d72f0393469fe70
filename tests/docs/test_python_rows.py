"""What may stand for a path in Python: rows in memory, and the run that trained a model."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from dschat.api.run import Run
from dschat.api.steps import PPO, SFT
from dschat.data.store import Source, load_source
from dschat.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"prompt": f"{n} and {n}?", "chosen": str(2 * n)} for n in range(1, 13)]


def source(rows: object, cache: Path) -> Source:
    """What step 1 would read where `data_path` is given these rows."""
    step = SFT(model_name_or_path=str(ROOT), data_path=rows, data_output_path=cache)
    (name,) = step.settings.data.data_path
    return load_source(name, seed=1, cache_dir=cache)


@pytest.mark.parametrize(
    "rows",
    [ROWS, tuple(ROWS), iter(ROWS), datasets.Dataset.from_list(ROWS), pd.DataFrame(ROWS)],
    ids=lambda rows: type(rows).__name__,
)
def test_rows_are_read_as_from_a_file(rows, tmp_path: Path):
    found = source(rows, tmp_path)
    kept = sorted([*found.train["prompt"], *found.test["prompt"]])
    assert kept == sorted(row["prompt"] for row in ROWS) and found.held_out == 1
    assert found.name == source(ROWS, tmp_path).name  # by content: once tokenised is enough
    assert found.name != source(ROWS[1:], tmp_path).name


def test_splits_stay_apart(tmp_path: Path):
    parts = {"train": ROWS[:9], "test": ROWS[9:]}
    as_sets = datasets.DatasetDict({n: datasets.Dataset.from_list(r) for n, r in parts.items()})
    for rows in (parts, as_sets):
        found = source(rows, tmp_path)
        assert found.test["chosen"] == ["20", "22", "24"] and len(found.train) == 9


def test_cells_of_other_libraries(tmp_path: Path):
    """A frame has NaN where it has nothing."""
    frame = pd.DataFrame([{**ROWS[0], "rejected": "No.", "margin": np.float32(0.5)}, ROWS[1]])
    found = source({"train": frame, "test": ROWS[2:]}, tmp_path)
    assert found.train["rejected"] == ["No.", None] and found.train["margin"] == [0.5, None]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (3, "data_path is of type int: give a path, or rows as a list of mappings, a datasets"),
        (ROWS[0], "data_path is of type str: give a path, or rows as a list of mappings"),
        ([*ROWS, "x"], "data_path row 13 is of type str, needs a mapping of columns"),
        ([{"prompt": object()}], "data_path row 1: a value of type object is no JSON; fix or drop"),
        ([], "data_path is empty: name at least one source"),
    ],
)
def test_what_is_no_rows_is_one_line(rows, message, tmp_path: Path):
    with pytest.raises(UserError) as error:
        source(rows, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_run_stands_for_its_model(tmp_path: Path):
    for name in ("sft", "reward"):
        (tmp_path / name).mkdir()
    sft, reward = Run(tmp_path, tmp_path / "sft"), Run(tmp_path, tmp_path / "reward", scores=True)
    roles = PPO(
        actor_model_name_or_path=sft, critic_model_name_or_path=reward, data_path=ROWS
    ).settings.roles
    assert roles.actor_model_name_or_path == str(tmp_path / "sft")
    assert roles.critic_model_name_or_path == str(tmp_path / "reward")
