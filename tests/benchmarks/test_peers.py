"""The peers' side of the comparison: the same rows everywhere, and nothing of this library."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.peers import __main__ as driver
from benchmarks.peers.task import END, RESULT, Task, Turns, tokenizer

FOLDER = Path(driver.__file__).parent


def test_peers_import_nothing_of_the_library():
    for name in ("task", "trainers", "recipe"):
        tree = ast.parse((FOLDER / f"{name}.py").read_text())
        modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        assert not [module for module in modules if module.split(".")[0] == "dschat"]


def test_every_process_draws_the_same_rows():
    task = Task("sft", 64, steps=2, turns=1, batch=4, length=20)
    rows = task.answers()
    assert rows == task.answers() and len(rows) == 3 * 4
    assert all(12 <= len(row["input_ids"]) <= 20 and row["input_ids"][-1] == END for row in rows)
    assert rows[0]["start"] == len(rows[0]["input_ids"]) * 2 // 3
    assert len(Task("reward", 64, 2, 1, 4, 20).pairs()) == 3 * 2  # a pair is two sequences
    pair = Task("dpo", 64, 2, 1, 4, 20).preferences()[0]
    assert len(pair["prompt_ids"]) == 8 and min(map(len, pair.values())) > 0


def test_prompts_are_words_of_one_token_each():
    texts = Task("grpo", 64, 2, 1, 4, 20).prompts(3)
    encoded = tokenizer(64)(texts).input_ids
    assert [len(ids) for ids in encoded] == [len(text.split()) for text in texts]
    assert all(12 <= len(ids) <= 20 and min(ids) > 3 for ids in encoded)


def test_a_peer_waits_for_its_turns(monkeypatch, capsys):
    """One step, then turns of two; the fifth step ends the second turn and waits for a third."""
    asked = iter(["\n", "\n", ""])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(readline=lambda: next(asked)))
    turns = Turns(steps=2, first_loss=0.5)
    for _ in range(4):
        turns.step_made()
    with pytest.raises(SystemExit):
        turns.step_made()
    told = [json.loads(line[len(RESULT) :]) for line in capsys.readouterr().out.split("\n") if line]
    assert [figures["loss"] for figures in told] == [0.5, 0.5]


def test_a_cell_is_medians_and_ratios_of_rounds(monkeypatch, tmp_path: Path):
    """Ours takes 1, 2, 3 CPU seconds in its turns; the others 2, 2, 9: times 2, 1 and 3."""

    class Fake:
        def __init__(self, peer: str, task: Task, folder: Path):
            self.seconds = iter([1.0, 2.0, 3.0] if peer == "ours" else [2.0, 2.0, 9.0])

        def train(self) -> dict[str, float]:
            seconds = next(self.seconds)
            return {"cpu": seconds, "wall": 2 * seconds, "rss": 100.0, "loss": 0.5}

        def close(self) -> None:
            pass

    monkeypatch.setattr(driver, "Worker", Fake)
    ours, plain, _ = driver.table(Task("sft", 64, 2, 3, 4, 20), tmp_path)
    assert ours == "| sft | 64 | ours | 2.00 | 4.00 | 100 |  |"
    assert plain.endswith("| 2.00 | 4.00 | 100 | 1.00 / **2.00** / 3.00 |")
