"""Win rates: files and models as candidates, a reward model and a chat model as judges."""

import json
from pathlib import Path

import pytest
import torch

from dschat import winrate
from dschat.data.answers import answer_rows
from dschat.data.tokenise import Converter
from dschat.errors import UserError
from dschat.models.reward_model import create_critic_model
from dschat.rlhf.candidates import GivenAnswer
from dschat.rlhf.judges import QUESTION, JudgeLimits, Verdicts, letter_ids, load_judge
from dschat.text.conversations import Example
from dschat.text.formats import choose_format
from dschat.train.answer_scores import score_answers
from tests.helpers.candidates import PROMPTS, SHORT, make_candidates
from tests.helpers.rounding import FIGURE, LOGITS
from tests.helpers.steps import write_rows
from tests.helpers.tiny import EOS, byte_tokenizer

LIMITS = JudgeLimits(None, 512, 4, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_candidates(tmp_path_factory.mktemp("winrate"))


def run(made: Path, one: str, other: str, judge: str, *more: str) -> dict:
    """Compare two candidates; return the report."""
    argv = ["--candidates", *(str(made / name) for name in (one, other)), "--batch_size", "4"]
    argv += ["--prompts", str(made / "prompts.jsonl"), "--judge", str(made / judge), *SHORT]
    winrate.main([*argv, "--output_dir", str(made / "out"), *more])
    return json.loads((made / "out" / "winrate.json").read_text())


def expected_scores(made: Path, answers: list[str], ended: list[bool]) -> torch.Tensor:
    tokenizer = byte_tokenizer()
    model = create_critic_model(str(made / "reward"), tokenizer, torch.float32).eval()
    convert = Converter(tokenizer, choose_format(tokenizer), 1, 512, None)
    examples = [Example(p, a) for p, a in zip(PROMPTS, answers, strict=True)]
    rows = answer_rows(convert, examples, ended)
    assert [row["input_ids"][-1] == EOS for row in rows] == ended
    return score_answers(model, rows, tokenizer.pad_token_id, LIMITS.device, 1)


def test_files_of_answers_by_a_reward_model(made, capsys):
    report = run(made, "a.jsonl", "b.jsonl", "reward", "--max_seq_len", "96")
    cut = [n != 3 for n in range(6)]
    mine = expected_scores(made, [f"so{n}" for n in range(6)], cut)
    theirs = expected_scores(made, [f"no, never{n}" for n in range(6)], [True] * 6)
    margins = [row["margin"] for row in report["rows"]]
    assert margins == pytest.approx((mine - theirs).tolist(), abs=LOGITS)
    figures = report["figures"]
    assert figures["win_rate"] == sum(m > 0 for m in margins) / 6
    # " so0" and its end, " no, never0" and its end; one answer was cut
    assert figures["tokens"] == pytest.approx([(5 * 5 + 4) / 6, 12.0])
    assert figures["ended"] == pytest.approx([5 / 6, 1.0])
    turned = run(made, "b.jsonl", "a.jsonl", "reward", "--max_seq_len", "96")
    assert [row["margin"] for row in turned["rows"]] == [-m for m in margins]
    for rate in ("win_rate", "length_controlled_win_rate"):
        assert turned["figures"][rate] == pytest.approx(1 - figures[rate], abs=FIGURE)
        assert turned["figures"][f"{rate}_low"] == pytest.approx(1 - figures[f"{rate}_high"])
    assert "win rate, equal lengths" in capsys.readouterr().out


def test_a_models_answers_are_drawn_by_seed_and_can_be_a_file(made):
    report = run(made, "model", "a.jsonl", "reward", "--max_seq_len", "96")
    again = run(made, "out/answers-1.jsonl", "a.jsonl", "reward", "--max_seq_len", "96")
    assert again["rows"] == report["rows"]
    answers = [row["answers"][0] for row in report["rows"]]
    assert len({*answers}) > 1 and not any(row["ended"][0] for row in report["rows"])
    other = run(made, "model", "a.jsonl", "reward", "--max_seq_len", "96", "--seed", "2")
    assert [row["answers"][0] for row in other["rows"]] != answers


def test_a_chat_model_is_asked_in_both_orders(made):
    judge = load_judge(str(made / "model"), LIMITS)
    prompts = [Example(prompt) for prompt in PROMPTS]
    first = [GivenAnswer(f"so{n}") for n in range(6)]
    second = [GivenAnswer("no, never") for _ in range(6)]
    verdicts, turned = judge(prompts, first, second), judge(prompts, second, first)
    assert torch.equal(turned.margin, -verdicts.margin) and verdicts.margin.abs().min() > 0
    shown = QUESTION.format(prompt="Question:\nWhat is 0?", a="so0", b="no, never")
    text = f"\n\nHuman: {shown}\n\nAssistant: "  # the next token is a letter
    ids = judge.convert.tokenizer(text, return_tensors="pt")["input_ids"]
    a, b = judge.convert.tokenizer.convert_tokens_to_ids(["A", "B"])
    with torch.no_grad():
        logits = judge.model(input_ids=ids).logits[0, -1]
    assert verdicts.orders[0][0].item() == pytest.approx(
        (logits[a] - logits[b]).item(), abs=2 * LOGITS
    )
    same = judge(prompts, first, first)
    assert same.margin.tolist() == [0.0] * 6  # whatever it thinks of the places
    forward, backward = same.orders
    assert forward.abs().min() > 0 and torch.equal(forward, -backward)
    figures = winrate.win_figures(same, first, first)
    assert figures["win_rate"] == 0.5 and figures["order_agreement"] == 0.0
    assert figures["tie_share"] == 1.0
    assert figures["first_shown_wins"] == pytest.approx((forward > 0).double().mean().item())


def test_of_answers_that_all_differ_alike_equal_lengths_are_not_known(made, capsys):
    write_rows(made / "long.jsonl", [{"prompt": p, "response": "so so so"} for p in PROMPTS])
    write_rows(made / "short.jsonl", [{"prompt": p, "response": "so"} for p in PROMPTS])
    report = run(made, "short.jsonl", "long.jsonl", "reward", "--max_seq_len", "96")
    names = [name for name, value in report["figures"].items() if value is None]
    assert len(names) == 4 and "length_controlled_win_rate" in names
    assert "not known: one side is 6 tokens longer in all" in capsys.readouterr().out


def test_verdicts_that_are_no_numbers_stop_it(made):
    judge = load_judge(str(made / "reward"), LIMITS)
    with torch.no_grad():
        judge.model.v_head.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="6 of 6 answers have scores that are not finite"):
        judge.scores([Example(p) for p in PROMPTS], [GivenAnswer("so")] * 6)
    with pytest.raises(UserError, match="1 of 2 verdicts are not finite"):
        Verdicts(torch.tensor([1.0, torch.nan]), (torch.ones(2), torch.ones(2)))


def test_letters_are_compared_where_they_part():
    """The format's space before an answer is a token of its own here: it is given."""
    tokenizer = byte_tokenizer()
    convert = Converter(tokenizer, choose_format(tokenizer), 3, 64, None)
    opening, letters = letter_ids(convert, Example("Which?"))
    assert tokenizer.decode(opening) == " " and tokenizer.decode(letters) == "AB"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--candidates", "{made}/a.jsonl"], "candidates names 1: give two"),
        (["--candidates", "{made}/model", "{made}/model"], "twice: it would tie with itself"),
        (["--candidates", "{made}/a.jsonl", "{made}/model/../a.jsonl"], "twice, also as "),
        (["--candidates", "me/model", "me/model"], "names me/model twice: it would tie"),
        (["--candidates", "{made}/a.jsonl", "{made}/few.jsonl"], "has 1 rows for 6 prompts"),
        (["--candidates", "{made}/a.jsonl", "{made}/other.jsonl"], "its prompt is not that of"),
        (["--candidates", "{made}/a.jsonl", "{made}/prompts.jsonl"], "has no answer; add a column"),
        (["--candidates", "{made}/a.jsonl", "{made}/reward"], "is a reward model"),
        (["--judge", "{made}/none"], "none"),
        (["--judge", "http://localhost:8000/v1"], "is an address: servers are not asked"),
        (["--max_seq_len", "600"], "has 512 positions"),
    ],
)
def test_what_cannot_be_compared_is_one_line(made, change, message):
    rows = [{"prompt": "What is 0?", "response": "x"}]
    write_rows(made / "few.jsonl", rows)
    write_rows(made / "other.jsonl", 6 * rows)
    argv = ["--candidates", *(str(made / f"{n}.jsonl") for n in "ab"), "--max_seq_len", "96"]
    argv += ["--prompts", str(made / "prompts.jsonl"), "--judge", str(made / "reward"), *SHORT]
    with pytest.raises(UserError) as error:
        winrate.main([*argv, *(word.format(made=made) for word in change)])
    assert message in str(error.value) and "\n" not in str(error.value)
