"""Sampled answers on the screen, and as lines of a file."""

import dataclasses
import json

import pytest
import torch

from dschat.errors import UserError
from dschat.rlhf.answers import LINES, Answer, AnswerFile, choose_answers, format_answers
from dschat.rlhf.reward_functions import RewardFunction
from dschat.rlhf.rewards import Rewards
from tests.helpers.tiny import byte_tokenizer
from tests.rlhf.hand_made import sampled

ANSWER = Answer(
    iteration=3,
    prompt="Human: why?\n\nAssistant:",
    answer=" because",
    reward=1.25,
    reward_model=0.25,
    reward_function=1.0,
    kl=-0.5,
    length=9,
    ended=True,
)


def test_the_lines_by_hand():
    other = dataclasses.replace(ANSWER, answer=9 * " no\tidea", ended=False, reward_function=None)
    assert format_answers([ANSWER, other], width=64).splitlines() == [
        r"prompt  'Human: why?\n\nAssistant:'",
        r"answer  ' because'",
        r"        reward 1.25 | model 0.25 | function 1 | KL -0.5 | 9",
        r"        tokens | ended",
        r"prompt  'Human: why?\n\nAssistant:'",
        r"answer  ' no\tidea no\tidea no\tidea no\tidea no\tidea no\tidea",
        r"        no\tidea no\tidea no\tidea'",
        r"        reward 1.25 | model 0.25 | KL -0.5 | 9 tokens | not",
        r"        ended",
    ]


def test_every_line_fits_and_texts_keep_the_end_that_counts():
    long = dataclasses.replace(ANSWER, prompt="zebra " + "p" * 900 + " quagga", answer="a" * 900)
    wide = dataclasses.replace(ANSWER, prompt="\x1b[2J" * 300, answer="漢字" * 200)
    for width in (40, 80, 133):
        lines = format_answers([long, wide], width).splitlines()
        assert len(lines) <= 2 * 2 * (LINES + 2)
        assert all(len(line) <= width and line.isprintable() for line in lines)
    text = format_answers([long], 100)
    assert "quagga" in text and "zebra" not in text


def test_rows_of_a_rollout():
    """Numbers of the rollout in hand_made.py; its filler row is no answer."""
    rewards = Rewards(functions=(RewardFunction("m:f", lambda prompt, answer: 2.0),))
    e = rewards.applied(sampled(), byte_tokenizer())
    e = dataclasses.replace(e, logprobs=torch.full((3, 4), -0.5), ref_logprobs=torch.zeros(3, 4))
    found = choose_answers([e], 3, byte_tokenizer(), iteration=7)
    assert found == [
        Answer(7, "q: b", "yes", 5.0, 3.0, 2.0, -2.0, 4, True),
        Answer(7, "q", "no!!", 1.0, -1.0, 2.0, -2.0, 4, False),
    ]
    spread = choose_answers([e, e, e], 3, byte_tokenizer(), iteration=7)
    assert [a.answer for a in spread] == ["yes", "yes", "yes"]  # the first of each rollout


def iterations(file: AnswerFile) -> list[int]:
    return [json.loads(line)["iteration"] for line in file.path.read_text().splitlines()]


def test_a_resumed_run_goes_on_with_its_own_lines(tmp_path):
    file = AnswerFile(tmp_path, None)
    for number in (1, 2, 3):
        file.write([dataclasses.replace(ANSWER, iteration=number)])
    with file.path.open("a") as cut:
        cut.write('{"iteration": 2, "pro')  # by a kill
    resumed = AnswerFile(tmp_path, resumed_at=2)
    assert iterations(resumed) == [1, 2]
    resumed.write([dataclasses.replace(ANSWER, iteration=3)])
    assert iterations(resumed) == [1, 2, 3]
    assert json.loads(resumed.path.read_text().splitlines()[-1]) == dataclasses.asdict(ANSWER)
    fresh = AnswerFile(tmp_path, None)
    assert not fresh.path.exists() and (tmp_path / "answers.1.jsonl").exists()


def test_an_evaluation_that_is_made_again_stands_once(tmp_path):
    """As at the end of a run that was killed after its last evaluation."""
    file = AnswerFile(tmp_path, None, "held_out.jsonl")
    for iteration in (0, 2, 4):
        file.replace(iteration, [dataclasses.replace(ANSWER, iteration=iteration)] * 2)
    whole = file.path.read_bytes()
    assert iterations(file) == [0, 0, 2, 2, 4, 4]
    with file.path.open("a") as half:
        half.write('{"iteration": 4')
    for resumed_at in (4, 3):
        resumed = AnswerFile(tmp_path, resumed_at, "held_out.jsonl")
        resumed.replace(4, [dataclasses.replace(ANSWER, iteration=4)] * 2)
        assert resumed.path.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["held_out.jsonl"]


def test_a_checkpoints_copy_is_what_a_resumed_run_goes_on_with(tmp_path, capsys):
    file, saved = AnswerFile(tmp_path, None), tmp_path / "saved.jsonl"
    for iteration in (1, 2):
        file.replace(iteration, [dataclasses.replace(ANSWER, iteration=iteration)])
    whole = file.path.read_bytes()
    saved.write_bytes(whole)
    # An evaluation was made again after the checkpoint: the file goes on as the copy says.
    file.replace(2, [dataclasses.replace(ANSWER, iteration=2, answer="another")])
    assert AnswerFile(tmp_path, 2, saved=saved).path.read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl", "saved.jsonl"}
    damaged = whole.replace(b'"answer": "', b'"answer": "x', 1)
    file.path.write_bytes(damaged)
    assert capsys.readouterr().out == ""
    assert AnswerFile(tmp_path, 2, saved=saved).path.read_bytes() == whole
    assert (tmp_path / "answers.1.jsonl").read_bytes() == damaged
    said = capsys.readouterr().out
    assert said.endswith("begins otherwise than the checkpoint's; kept as answers.1.jsonl\n")


@pytest.mark.parametrize("line", ["{", "[]", '{"iteration": "x"}', "[" * 99_999, "{}"])
def test_a_damaged_line_without_a_copy_is_one_line(tmp_path, line):
    (tmp_path / "answers.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"answers\.jsonl: a line is damaged; remove the file"):
        AnswerFile(tmp_path, resumed_at=2)


def test_texts_may_hold_any_character(tmp_path):
    """Unicode's own line ends stand in JSON as they are; a kill can cut a character apart."""
    odd = dataclasses.replace(ANSWER, iteration=1, answer="a\u2028b\x85c\r\nd")
    file = AnswerFile(tmp_path, None)
    file.write([odd, odd])
    whole = file.path.read_bytes()
    with file.path.open("ab") as cut:
        cut.write(b'{"iteration": 1, "prompt": "\xe2\x80')
    assert AnswerFile(tmp_path, resumed_at=1).path.read_bytes() == whole
    assert json.loads(whole.split(b"\n")[1]) == dataclasses.asdict(odd)


@pytest.mark.parametrize("columns", ["60", "140"])
def test_the_terminal_decides_the_width(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    long = dataclasses.replace(ANSWER, prompt="p" * 900, answer="a" * 900)
    assert max(map(len, format_answers([long]).splitlines())) == int(columns)
