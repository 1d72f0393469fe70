"""A report on pairs: its parts, a model that scores length, its files and single lines."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from dschat.data.tokenise import Converter
from dschat.data.user_reader import ReadOptions
from dschat.errors import UserError
from dschat.models.reward_model import RewardModel, scores_at_end
from dschat.text.formats import choose_format
from dschat.train.answer_scores import LineScorer
from dschat.train.pair_plot import report_files
from dschat.train.pair_report import PairReport, ScoredPairs
from tests.helpers.candidates import make_candidates
from tests.helpers.steps import REWARD_EVALUATION, ROOT, write_rows
from tests.helpers.tiny import EOS, byte_tokenizer, tiny_llama

CPU = torch.device("cpu")


def pairs(margin: list[float], chosen: list[int], rejected: list[int]) -> ScoredPairs:
    score = torch.tensor(margin, dtype=torch.float64)
    lengths = (torch.tensor(tokens, dtype=torch.float64) for tokens in (chosen, rejected))
    return ScoredPairs(score, torch.zeros_like(score), *lengths)


def drawn(count: int, seed: int, longer_is_better: float) -> ScoredPairs:
    """Pairs of which a share has the longer answer chosen; the scores are the lengths."""
    draw = torch.Generator().manual_seed(seed)
    short = torch.randint(2, 100, (count,), generator=draw).double()
    long = short + torch.randint(1, 200, (count,), generator=draw).double()
    first = torch.rand(count, generator=draw) < longer_is_better
    chosen, rejected = torch.where(first, long, short), torch.where(first, short, long)
    return ScoredPairs(chosen / 100, rejected / 100, chosen, rejected)


def test_a_model_that_scores_length_shows_itself():
    """Its accuracy is that of taking the longer answer: 1 in some buckets, 0 in the others."""
    report = PairReport.of(drawn(400, seed=0, longer_is_better=0.6))
    assert report.whole.length_agreement == 1.0
    assert report.whole.accuracy == report.whole.length_only < 0.7
    for part in report.length_difference:
        assert part.accuracy == part.length_only == float(part.name.startswith("+"))
    (advice,) = (line for line in report.lines() if line.startswith("advice"))
    assert "prefers the longer answer in 100.0% of the pairs" in advice


def advice_on(longer_wins: float, longer_preferred: float) -> list[str]:
    """Of 1,000 pairs, the model's preference apart from the data's."""
    draw = torch.Generator().manual_seed(3)
    wins, preferred = (
        torch.rand(1000, generator=draw) < share for share in (longer_wins, longer_preferred)
    )
    long, short = torch.full((1000,), 20.0).double(), torch.full((1000,), 10.0).double()
    chosen, rejected = torch.where(wins, long, short), torch.where(wins, short, long)
    score = torch.where(preferred == wins, 1.0, -1.0).double()
    report = PairReport.of(ScoredPairs(score, 0 * score, chosen, rejected))
    return [line for line in report.lines() if line.startswith("advice")]


def test_length_is_followed_only_beyond_chance():
    """A model that knows nothing of a set is no follower of length, however long its answers."""
    assert advice_on(0.85, 0.5) == advice_on(0.2, 0.5) == advice_on(0.85, 0.7) == []
    (line,) = advice_on(0.85, 0.1)
    assert "prefers the shorter answer in 9" in line and "the data does in 1" in line
    (line,) = advice_on(0.3, 0.7)
    assert "prefers the longer answer in 7" in line or "prefers the longer answer in 6" in line


def test_a_model_that_follows_its_data_gets_no_advice():
    """Right in 80 % of pairs whatever the lengths: agreement is near the data's own."""
    lengths, draw = drawn(400, seed=1, longer_is_better=0.55), torch.Generator().manual_seed(2)
    sign = torch.where(torch.rand(400, generator=draw) < 0.8, 1.0, -1.0).double()
    scored = ScoredPairs(sign, 0 * sign, lengths.chosen_tokens, lengths.rejected_tokens)
    report = PairReport.of(scored)
    assert not [line for line in report.lines() if line.startswith("advice")]
    assert min(part.accuracy for part in report.length_difference if part.pairs > 20) > 0.6


def test_buckets_sources_and_subsets_hold_each_pair_once():
    scored = pairs([1.0, -1.0, 2.0, 0.0], [5, 5, 40, 5], [5, 14, 5, 300])
    report = PairReport.of(scored, ["b", "a", "b", "b"], ["x", None, "x", "y"])
    found = [(p.name, p.pairs, p.accuracy, p.length_only) for p in report.length_difference]
    assert found == [
        ("-129 or less", 1, 0.5, 0.0),
        ("-32 to -9", 1, 0.0, 0.0),
        ("+0", 1, 1.0, 0.5),
        ("+33 to +128", 1, 1.0, 1.0),
    ]
    assert [(p.name, p.pairs, p.margin) for p in report.sources] == [("a", 1, -1.0), ("b", 3, 1.0)]
    assert [(p.name, p.pairs) for p in report.subsets] == [("x", 2), ("y", 1)]
    one_source = PairReport.of(scored, ["a"] * 4, [None] * 4)
    assert one_source.sources == one_source.subsets == []
    (named,) = PairReport.of(scored, None, ["x", None, "x", "x"]).subsets  # the rest is in none
    assert (named.name, named.pairs) == ("x", 3)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="1 of 2 pairs have scores that are not finite"):
        PairReport.of(pairs([1.0, float("nan")], [1, 1], [1, 1]))


def test_the_files_of_a_report():
    report = PairReport.of(pairs([1.0, -2.0], [3, 4], [4, 3]))
    files = report_files(report, {"data_path": ["a.jsonl"]}, rank=0)
    assert [*files] == ["evaluation.json", "evaluation.png"]
    assert report_files(report, {}, rank=1) == {}
    read = json.loads(files["evaluation.json"])
    assert read["figures"]["accuracy"] == 0.5 and read["settings"] == {"data_path": ["a.jsonl"]}
    assert files["evaluation.png"].startswith(b"\x89PNG")


class Scorer:
    """A reward model that scores lines."""

    def __init__(self):
        torch.manual_seed(0)
        self.tokenizer = byte_tokenizer()
        self.model = RewardModel(tiny_llama(max_position_embeddings=128).model).eval()
        convert = Converter(self.tokenizer, choose_format(self.tokenizer), 1, 128, None)
        self.lines = LineScorer(self.model, convert, CPU, ReadOptions())

    @torch.no_grad()
    def expected(self, text: str) -> float:
        ids = torch.tensor([[*self.tokenizer(text)["input_ids"], EOS]])
        mask = torch.ones_like(ids, dtype=torch.bool)
        return scores_at_end(self.model(ids, mask), mask).item()


def test_lines_are_scored_as_rows_or_as_they_stand():
    scorer = Scorer()
    lines = ['{"prompt": "Why?", "response": "So."}\n', "\n", "Human: x\n", '"a\\nb"']
    texts = ["\n\nHuman: Why?\n\nAssistant: So.", "Human: x", "a\nb"]
    scored = [json.loads(line) for line in scorer.lines(lines)]
    assert [one["score"] for one in scored] == [scorer.expected(text) for text in texts]
    assert [one["tokens"] for one in scored] == [len(text) + 1 for text in texts]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "Why?"}', "line 2: column 'response' is missing or null"),
        ('{"prompt": 3, "response": "So."}', "line 2: column 'prompt' is a number, needs text"),
        ('{"prompt": "", "response": "So."}', "line 2: the prompt is empty"),
        ("{prompt}", "line 2: begins like JSON and is none"),
        ('{"question": "Why?"}', "line 2: no column 'prompt'"),
    ],
)
def test_a_line_that_is_no_row_is_named(line, message):
    scorer = Scorer()
    with pytest.raises(UserError) as error:
        list(scorer.lines(["so", line]))
    assert str(error.value).startswith(message)


def test_other_pairs_and_lines_are_scored_in_the_precision_of_training(tmp_path, capsys):
    """All of its settings serve a repetition alone."""
    recorded = runpy.run_path(str(ROOT / REWARD_EVALUATION))["recorded"]
    settings = {"data_path": ["a.jsonl"], "max_seq_len": 64, "dtype": "fp32"}
    folder = {"model_name_or_path": str(tmp_path)}
    assert recorded(folder) == recorded(folder | {"stdin": True}) == {}  # nothing is known of it
    (tmp_path / "evaluation.json").write_text(json.dumps({"settings": settings}))
    assert recorded(folder) == settings
    capsys.readouterr()
    assert recorded(folder | {"stdin": True}) == {"dtype": "fp32"}
    assert capsys.readouterr() == ("", 'as in training: dtype "fp32"\n')
    assert recorded(folder | {"data_path": ("b.jsonl",)}) == {"dtype": "fp32"}
    with pytest.raises(UserError, match=r"^all_rows: without data_path these are the rows"):
        recorded(folder | {"all_rows": True})
    assert recorded(folder | {"stdin": True, "dtype": "bf16"}) == {}


@pytest.mark.parametrize(
    ("flags", "pairs"),
    [
        ("--all_rows --data_split 1,1,1 --max_train_samples 2", 30),
        ("--all_rows --max_eval_samples 7", 7),
        ("--data_split 0,0,1 --max_eval_samples 2", 2),  # of the three that are held out
    ],
)
def test_all_rows_are_all_whatever_a_split_would_leave_out(
    flags: str, pairs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_candidates(tmp_path)
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": f"no {n}"} for n in range(30)]
    write_rows(tmp_path / "bench.jsonl", rows)
    words = f"--model_name_or_path {tmp_path}/reward --data_path {tmp_path}/bench.jsonl --show 0"
    words += f" --data_output_path {tmp_path}/cache --output_dir {tmp_path}/out --max_seq_len 64"
    monkeypatch.setattr("sys.argv", ["rw_eval.py", *words.split(), *flags.split()])
    runpy.run_path(str(ROOT / REWARD_EVALUATION))["main"]()
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["figures"]["pairs"] == pairs
