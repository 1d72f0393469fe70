"""The sums of the arithmetic benchmark: right where they should be, and held out for good."""

import json
import random

import pytest

from benchmarks.arithmetic import (
    ANSWER,
    ARMS,
    GRPO,
    HELD_OUT,
    SLIPS,
    SUMMANDS,
    answer_of_kind,
    write_inputs,
)
from dschat.config import RLHFSettings
from dschat.config.cli import parse
from dschat.rlhf.checks import exact_number
from dschat.text.tokenizer import load_hf_tokenizer


def test_every_kind_but_the_right_one_is_wrong():
    draw = random.Random(0)
    for a in range(SUMMANDS):
        for b in range(0, SUMMANDS, 7):
            for kind in ("right", *SLIPS):
                text = answer_of_kind(draw, a, b, kind)
                (score,) = exact_number([""], [text], answer=[f"#### {a + b}"])
                by_chance = kind == "endless" and a + b < 10  # its sum of tens is the result
                assert score == (kind == "right") or by_chance, text
    assert answer_of_kind(draw, 27, 35, "right") == " 7 + 5 = 12, 2 + 3 + 1 = 6 #### 62"
    assert answer_of_kind(draw, 27, 35, "carry") == " 7 + 5 = 12, 2 + 3 = 5 #### 52"


@pytest.mark.slow
def test_held_out_sums_are_nowhere_in_training_and_answers_fit(tmp_path):
    write_inputs(tmp_path, seed=3)
    sets = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("sft/train", "sft/test", "data/train", "data/test")
    }
    questions = {name: {row["question"] for row in rows} for name, rows in sets.items()}
    assert questions["data/test"] == questions["sft/test"]
    assert len(questions["data/test"]) == HELD_OUT
    assert not questions["data/test"] & (questions["sft/train"] | questions["data/train"])
    tokenizer = load_hf_tokenizer(str(tmp_path / "model"))
    complete = [row["answer"] for row in sets["sft/train"] if "####" in row["answer"]]
    lengths = [len(ids) + 1 for ids in tokenizer(complete, add_special_tokens=False).input_ids]
    assert max(lengths) < ANSWER  # with its end token


def test_every_arm_is_a_command_line():
    for flags in ARMS.values():
        words = [w for name, value in (GRPO | flags).items() for w in (f"--{name}", value) if w]
        parse(RLHFSettings, ["--actor_model_name_or_path", "m", *words], None)
