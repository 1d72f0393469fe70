"""Streamed rows: each once an epoch on any number of ranks, phases apart, nothing kept."""

import pytest

from dschat.config import RewardSettings, RLHFSettings, SFTSettings
from dschat.config.cli import parse
from dschat.data import stream
from dschat.data.batching import build_loader
from dschat.data.collators import PairCollator, PromptCollator, SFTCollator
from dschat.errors import UserError
from dschat.text.formats import set_format
from dschat.train.steps import StepPlan
from tests.data.spec import Spec
from tests.helpers.tiny import byte_tokenizer

ROWS = [
    {"prompt": f"{n:03}" + "." * (n % 7), "chosen": f" {n}" if n % 10 else "", "rejected": " no"}
    for n in range(101)
]
COLLATORS = {1: SFTCollator, 2: PairCollator, 3: PromptCollator}


@pytest.fixture
def spec(write_rows, tmp_path) -> Spec:
    write_rows(ROWS[:61], "one/train.jsonl")
    write_rows(ROWS[61:], "two/train.jsonl")
    for name in ("one", "two"):
        write_rows(ROWS[1:4], f"{name}/test.jsonl")
    paths = (str(tmp_path / "one"), str(tmp_path / "two"))
    out = str(tmp_path / "cache")
    return Spec(
        data_path=paths,
        data_output_path=out,
        seed=5,
        max_seq_len=32,
        max_prompt_len=16,
        streaming=True,
    )


def _names(batch) -> list[int]:
    """The rows of a batch, by the digits that they begin with."""
    ids = batch.input_ids[: len(batch.real)][batch.real]
    texts = [byte_tokenizer().decode(row, skip_special_tokens=True) for row in ids.tolist()]
    return [int(text[:3]) for text in texts]


def _tokenizer():
    tokenizer = byte_tokenizer()
    set_format(tokenizer, "raw", teaches=True)
    return tokenizer


def _epoch(spec, phase, world_size, epoch=0, batch_size=4):
    data = spec.make(_tokenizer(), phase)
    ranks = []
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "seed": 1, "shuffle": True}
        loader = build_loader(data.train, COLLATORS[phase](0), batch_size, **options)
        ranks.append([_names(batch) for batch in loader.batches(epoch)])
    return ranks


@pytest.mark.parametrize("phase", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_once_and_as_many_batches_on_every_rank(spec, phase, world_size, monkeypatch):
    monkeypatch.setattr(stream, "BATCHES_PER_BLOCK", 5)
    ranks = _epoch(spec, phase, world_size)
    assert len({len(batches) for batches in ranks}) == 1
    assert max(len(batch) for batches in ranks for batch in batches) <= 4
    kept = [n for n in range(101) if phase != 1 or n % 10]  # empty answers train nothing
    assert sorted(n for batches in ranks for batch in batches for n in batch) == kept


def test_epochs_differ_and_repeat(spec):
    first, second, again = (_epoch(spec, 2, 1, epoch) for epoch in (0, 1, 0))
    assert first == again != second


def test_blocks_are_of_all_sources(spec, monkeypatch):
    monkeypatch.setattr(stream, "BATCHES_PER_BLOCK", 5)
    ((*batches,),) = _epoch(spec, 2, 1)
    first = [n for batch in batches[:5] for n in batch]
    assert sum(n < 61 for n in first) == sum(n >= 61 for n in first) == 10


def test_phases_do_not_mix(spec):
    spec = spec.but(data_split="2,4,4")
    seen = [
        [n for batches in _epoch(spec, phase, 1) for batch in batches for n in batch]
        for phase in (1, 2, 3)
    ]
    assert not set(seen[0]) & set(seen[1]) and not set(seen[1]) & set(seen[2])
    everything = sorted(n for part in seen for n in part)
    dropped = set(range(101)) - set(everything)
    assert all(n % 10 == 0 for n in dropped)
    assert 30 < len(seen[1]) < 52 and 30 < len(seen[2]) < 52


def test_nothing_is_kept_and_what_is_dropped_is_told(spec, tmp_path, capsys):
    _epoch(spec, 1, 1)
    assert not (tmp_path / "cache").exists()
    assert "101 rows, 90 used, 11 empty answers\n" in capsys.readouterr().out


def test_rows_without_use_are_told(spec, write_rows, capsys):
    """Equal scores: neither answer is preferred."""
    scores = [{"score_chosen": 1.0, "score_rejected": float(n == 7)} for n in range(61)]
    write_rows([row | score for row, score in zip(ROWS, scores, strict=False)], "one/train.jsonl")
    ((*batches,),) = _epoch(spec, 2, 1)
    assert sum(map(len, batches)) == 100
    assert "1 skipped (tie)" in capsys.readouterr().out


def test_rows_are_those_of_the_set_that_is_kept(spec):
    kept = spec.but(streaming=False).make(_tokenizer(), 1)
    streamed = spec.make(_tokenizer(), 1)
    assert sorted(streamed.eval["input_ids"]) == sorted(kept.eval["input_ids"])
    rows = list(streamed.train.read())
    found = streamed.train.convert(rows, stream.Counter())
    assert sorted(found["input_ids"]) == sorted(kept.train["input_ids"])
    assert streamed.report.lines()[-1] == (
        "supervised fine-tuning: rows streamed to train on, 6 to evaluate"
    )


def test_bad_rows_and_missing_tests_are_named(spec, write_rows, tmp_path):
    write_rows([*ROWS[:5], {"prompt": "p", "chosen": "c"}], "one/train.jsonl")
    with pytest.raises(UserError, match=r"train\.jsonl line 6 has no 'rejected'"):
        _epoch(spec, 2, 1)
    (tmp_path / "one" / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"streaming: .*one has no test rows"):
        spec.make(byte_tokenizer(), 2)


def _steps(*argv: str):
    one = ["--model_name_or_path", "m", "--streaming", *argv]
    two = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c", "--streaming"]
    yield lambda: parse(SFTSettings, one, "")
    yield lambda: parse(RewardSettings, one, "")
    yield lambda: parse(RLHFSettings, [*two, *argv], "")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "give max_steps"),
        ("--max_steps 5 --max_train_samples 3", "and max_train_samples"),
        ("--max_steps 5 --preprocessing_num_workers 2", "and preprocessing_num_workers"),
        ("--max_steps 5 --num_train_epochs 2", "and num_train_epochs"),
        ("--max_steps 5 --save_steps 2 --output_dir out", "and save_steps or resume"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(argv, words):
    for build in _steps(*argv.split()):
        with pytest.raises(UserError, match=f"streaming.*{words}"):
            build()


@pytest.mark.parametrize("flag", ["--packing", "--max_tokens_per_batch 4096"])
def test_batches_of_all_lengths_are_refused(flag):
    with pytest.raises(UserError, match=f"streaming and {flag.split()[0][2:]}: it needs all len"):
        next(_steps("--max_steps", "5", *flag.split()))()


def test_a_stream_goes_on_until_max_steps():
    steps = StepPlan.of([None], batches_per_step=2, max_steps=7)
    assert (steps.total_steps, steps.epochs) == (7, 7)
    settings = list(_steps("--max_steps", "7"))[2]()
    assert settings.iterations(None) == 7
