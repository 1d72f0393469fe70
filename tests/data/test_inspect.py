"""What `python -m dschat.data inspect` tells, and that it tells the truth about batches."""

import datasets
import numpy as np
import pytest

from dschat.data.__main__ import main
from dschat.data.batching import RowBatches, build_loader
from dschat.data.collators import PackedCollator, PairCollator, SFTCollator
from dschat.data.inspection import Marks, histogram, real_share, render, sequence_lengths
from dschat.data.token_batches import PackedBatches, TokenBudgetBatches
from dschat.errors import UserError
from tests.helpers.tiny import byte_tokenizer

PAIRS = [
    {"prompt": f"say {n}:", "chosen": f" {n}!", "rejected": " no" * (n % 5)} for n in range(1, 41)
]


@pytest.fixture
def flags(write_rows, tmp_path) -> list[str]:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = ["--model_name_or_path", str(tmp_path / "model"), "--data_split", "1"]
    write_rows(PAIRS, "set/train.jsonl")
    write_rows(PAIRS[:3], "set/test.jsonl")
    data = ["--data_path", str(tmp_path / "set"), "--data_output_path", str(tmp_path / "cache")]
    return ["inspect", *model, *data, "--max_seq_len", "64"]


def test_all_phases_are_told(flags, capsys):
    main(flags)
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith("==")]
    assert [head.split(",")[0] for head in heads] == ["== phase 1", "== phase 2", "== phase 3"]
    assert sum("40 of 40 rows" in line for line in lines) == 3
    text = "\n".join(lines)
    assert "-- row 1 of 40: row, " in text and "-- row 27 of 40: rejected, " in text
    assert "Assistant:[[ 1!</s>]]" in text and "Assistant:[[ no</s>]]" in text  # phases 1 and 2
    assert text.count("-- row ") == 3 + 6 + 3
    assert "-- row 1 of 40: prompt, 27 tokens\n\n\nHuman: say 1:\n\nAssistant:" in text
    assert sum("prompts are plain text, each one question" in line for line in lines) == 3


def test_a_phase_that_the_data_cannot_serve(flags, write_rows, capsys):
    write_rows(
        [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in PAIRS], "set/train.jsonl"
    )
    main(flags)
    out = capsys.readouterr().out
    assert "cannot be made of this data: " in out and "has no 'rejected'" in out
    with pytest.raises(UserError, match="has no 'rejected'"):
        main([*flags, "--phase", "2"])


def test_data_that_no_phase_can_use_is_an_error(flags, write_rows, capsys):
    write_rows([{"question": "what?"}] * 3, "set/train.jsonl")
    with pytest.raises(UserError, match="no phase can be made of this data; fix what is said"):
        main(flags)
    assert capsys.readouterr().out.count("no column 'prompt' (columns: question)") == 3


def test_flags_that_do_nothing_and_batches_that_training_would_refuse(flags, capsys):
    main([*flags, "--phase", "3", "--eot_token", "x", "--train_on", "last_turn"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " does nothing" in line]
    said = {line.split(" does nothing")[0] for line in lines}
    assert said == {"--train_on", "--eot_token", "--max_seq_len"}
    with pytest.raises(UserError, match="max_tokens_per_batch is 100: a pair may have 128 tokens"):
        main([*flags, "--phase", "2", "--max_tokens_per_batch", "100"])
    main([*flags, "--phase", "1", "--max_tokens_per_batch", "100"])
    assert "--max_tokens_per_batch 100 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no command; give: python -m"),
        (["look"], "unknown command look"),
        (["inspect", "--phas", "1"], "unknown flag --phas; did you mean --phase"),
        (["inspect", "--model_name_or_path", "m", "--samples", "-1"], "samples is -1"),
    ],
)
def test_wrong_commands_are_one_line(argv, words):
    with pytest.raises(UserError, match=words):
        main(argv)


@pytest.mark.parametrize(
    ("no_color", "mark"), [("", "\033[1;32m 1!</s>\033[0m"), ("1", "[[ 1!</s>]]")]
)
def test_colour_on_a_terminal_that_wants_it(flags, capsys, monkeypatch, no_color, mark):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    main([*flags, "--phase", "1", "--samples", "1"])
    out = capsys.readouterr().out
    assert mark in out and ("\033" in out) == (not no_color)


def test_every_trained_turn_is_marked(space_tokenizer):
    ids = space_tokenizer("hi a lo a hi")["input_ids"]
    text = space_tokenizer.decode(ids)
    row = {"input_ids": ids, "trained": [2, 3, 4, 5]}
    ((label, shown),) = render(row, 1, space_tokenizer, Marks("[[", "]]"))
    assert label == f"row, {len(ids)} tokens"
    assert shown.count("[[") == 2 and shown.replace("[[", "").replace("]]", "") == text


def test_histogram_by_hand():
    lines = histogram(np.array([[1, 1, 1, 1, 12]]))
    assert lines[0] == "tokens a sequence: 1 to 12, mean 3.2, median 1, 95 % have at most 10"
    assert lines[1] == "     1 to 1             4  " + 40 * "#"
    assert lines[-1] == "    12 to 12            1  " + 10 * "#"
    assert len(lines) == 13 and lines[2].split() == ["2", "to", "2", "0"]


@pytest.mark.parametrize("sampler", [RowBatches(4), TokenBudgetBatches(80), PackedBatches(2, 40)])
def test_the_share_of_real_tokens_is_that_of_the_batches(sampler):
    lengths = np.random.default_rng(1).integers(2, 38, 100).tolist()
    rows = [{"input_ids": [5] * n, "trained": [1, n], "length": n} for n in lengths]
    collator = PackedCollator(0) if isinstance(sampler, PackedBatches) else SFTCollator(0)
    _assert_share(rows, 1, collator, sampler)


def test_the_share_of_pairs():
    draw = np.random.default_rng(2).integers(2, 30, (60, 2)).tolist()
    rows = [
        {"chosen_ids": [5] * a, "rejected_ids": [6] * b, "prompt_len": 1, "length": max(a, b)}
        for a, b in draw
    ]
    _assert_share(rows, 2, PairCollator(0), TokenBudgetBatches(100, sequences=2))


def _assert_share(rows, phase, collator, sampler):
    data = datasets.Dataset.from_list(rows)
    loader = build_loader(data, collator, sampler, rank=0, world_size=1, seed=3, shuffle=True)
    masks = [batch.attention_mask for batch in loader]
    found = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert real_share(sequence_lengths(data, phase), sampler, seed=3) == pytest.approx(found)
