"""Reward model and DPO on real preferences, side by side: the same rows, one judge, tables."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification

from benchmarks.peers import __main__ as driver
from benchmarks.peers import hh, hh_rows, scores
from benchmarks.peers.task import Task
from tests.helpers import tiny
from tests.helpers.rounding import LOGITS, NEAR_ONE

CHATS = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LONGEST = 64


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny.save_llama_folder(tmp_path / "model", max_position_embeddings=2 * LONGEST)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = CHATS
    tokenizer.init_kwargs.pop("prompt_format")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "hh"
    folder.mkdir()
    for name, count in (("train", 12), ("test", 4)):
        rows = [
            {"prompt": f"{name[1:]}{n}", "chosen": f" {n}", "rejected": "x"} for n in range(count)
        ]
        rows += [{"prompt": "y" * LONGEST, "chosen": "a", "rejected": "b"}]  # too long
        rows += [{"prompt": "y", "chosen": "a", "rejected": "a"}]  # nothing to choose
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def written(model: Path, data: Path, tmp_path: Path) -> tuple[Path, Path]:
    kept, ids = tmp_path / "data", tmp_path / "ids"
    for folder in (kept, ids):
        folder.mkdir()
    hh_rows.select(str(model), data, kept, {"train": 10, "test": 3}, LONGEST)
    hh_rows.write_ids(str(model), kept, ids, 2, LONGEST)
    return kept, ids


def test_rows_that_fit_stand_as_tokens_in_the_order_of_training(
    model: Path, data: Path, tmp_path: Path
):
    kept, ids = written(model, data, tmp_path)
    decode = tiny.byte_tokenizer().decode
    texts = {json.loads(line)["prompt"] for line in (kept / "train.jsonl").open()}
    assert len(texts) == 10 and all(text.startswith("rain") for text in texts)
    rows = [json.loads(line) for line in (ids / "train.jsonl").open()]
    prompts = [decode(row["prompt_ids"]) for row in rows]
    assert {p.split(":")[1].removesuffix("</s>assistant") for p in prompts} == texts
    assert prompts != sorted(prompts)
    assert all(row["chosen_ids"][-1] == row["rejected_ids"][-1] == tiny.EOS for row in rows)
    task = Task("dpo", 0, 1, 4, 4, LONGEST, data=str(ids / "train.jsonl"), output="o")
    assert task.preferences() == rows


def test_the_judge_scores_a_text_with_its_end_and_an_answer_alone(tmp_path: Path):
    model = tiny.tiny_llama()
    model.save_pretrained(tmp_path / "policy")
    row = {"prompt_ids": [5, 6, 7], "chosen_ids": [9, 8, 2], "rejected_ids": [4, 2]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")

    def found(kind: str, folder: str) -> list[list[float]]:
        paths = (tmp_path / name for name in ("rows.jsonl", folder, "out.json"))
        scores.main(kind, *map(str, paths))
        return json.loads((tmp_path / "out.json").read_text())

    with torch.no_grad():
        expected = []
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            logprobs = model(torch.tensor([row["prompt_ids"] + answer])).logits[0].log_softmax(-1)
            at = range(2, 2 + len(answer))  # each token is forecast one place before it
            expected.append(sum(logprobs[i, t].item() for i, t in zip(at, answer, strict=True)))
    assert found("dpo", "policy") == [pytest.approx(expected, abs=LOGITS)]

    config = model.config
    config.num_labels, config.pad_token_id = 1, tiny.PAD
    classifier = LlamaForSequenceClassification(config).eval()
    classifier.save_pretrained(tmp_path / "reward")
    with torch.no_grad():
        values = [
            classifier.score(classifier.model(torch.tensor([row["prompt_ids"] + a]))[0])[0, -1]
            for a in (row["chosen_ids"], row["rejected_ids"])
        ]
    assert found("reward", "reward") == [pytest.approx([v.item() for v in values], abs=NEAR_ONE)]


def test_rates_fall_with_the_width(model: Path):
    """At width 32: A of DPO 2.5e-6 x 80, of a reward model 3.75e-5 x 32, its head 5e-5 x 32."""
    assert hh.rates("dpo", str(model))["lora_learning_rate"] == "0.0002"
    reward = {"lora_learning_rate": "0.0012", "learning_rate": "0.0016"}
    assert hh.rates("reward", str(model)) == reward


def test_tables_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ours is right in 2 of 4 and ties once, which is half; base's margins come off DPO's."""
    of_folder = {
        "reward-ours": [1.0, 2.0, -1.0, 0.0],
        "reward-trl": [-1.0, -1.0, -1.0, 1.0],
        "dpo-ours": [1.0, 2.0, -1.0, 3.0],
        "dpo-trl": [1.0, 1.0, 1.0, 1.0],
        "base": [1.0, 1.0, 1.0, 1.0],
    }
    monkeypatch.setattr(hh, "margins", lambda kind, folder, kept: of_folder[folder.name])
    args = Namespace(test=4, output=tmp_path, model="base")
    ours, trl = hh.held_out("reward", args, tmp_path)
    assert ours.startswith("| reward | ours | 0.625 (") and ours.endswith("| 0.500 ± 0.645 |")
    assert trl.startswith("| reward | TRL | 0.250 (")
    ours, trl = hh.held_out("dpo", args, tmp_path)  # 0, 1, -2, 2 at beta 0.1
    assert ours.startswith("| dpo | ours | 0.625 (") and "| 0.025 ± " in ours
    assert trl.startswith("| dpo | TRL | 0.500 (")
    turns = {"ours": [{"cpu": 1.0, "rss": 5}, {"cpu": 2.0, "rss": 7}]}
    turns["TRL"] = [{"cpu": 2.0, "rss": 9}, {"cpu": 3.0, "rss": 8}]
    assert list(hh.speed("dpo", turns, 30)) == [
        "| dpo | ours | 10 | 7 |  |",
        "| dpo | TRL | 6 | 9 | 1.50 / **1.75** / 2.00 |",
    ]


def test_wins_that_are_not_known_at_equal_lengths_are_a_row(model: Path, tmp_path: Path):
    """As where all answers of one side are longer by the same number of tokens."""
    figures = {"win_rate": 0.75, "win_rate_low": 0.5, "win_rate_high": 0.875, "tokens": [9.0, 4.0]}
    figures |= dict.fromkeys(f"length_controlled_win_rate{x}" for x in ("", "_low", "_high"))
    for peer in ("ours", "trl"):
        hh.load_hf_tokenizer(str(model)).save_pretrained(tmp_path / f"dpo-{peer}")
        folder = tmp_path / f"win-{peer}"
        folder.mkdir()
        (folder / "winrate.json").write_text(json.dumps({"figures": figures}))
    rows = list(hh.wins(Namespace(output=tmp_path, model=str(model)), tmp_path))
    cells = "| 0.750 (0.500 to 0.875) | not known | 9.0, 4.0 |"
    assert rows == [f"| ours {cells}", f"| TRL {cells}"]


@pytest.mark.slow
def test_a_whole_run_with_this_project_on_both_sides(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Both sides are one program, so all that the tables compare is equal."""
    monkeypatch.setattr(driver, "PACKAGES", {})
    words = f"--model {model} --data {data} --output {tmp_path / 'out'} --tasks reward --turns 2"
    words += f" --steps 2 --batch 2 --length {LONGEST} --test 3 --environments {tmp_path / 'e'}"
    monkeypatch.setattr("sys.argv", ["hh", *words.split()])
    hh.main()
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| reward")]
    ours, other = (line.split("|")[3:] for line in tables[2:])
    assert len(tables) == 4 and ours == other and "nan" not in ours[1]
    assert (tmp_path / "out" / "reward-trl" / "model.safetensors").is_file()
