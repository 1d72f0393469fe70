"""The judge finds each kind of fault, and nothing where all is well."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.faults import judge
from tests.faults.cases import Case, long_form, middle_form
from tests.faults.judge import Results
from tests.faults.programs import OUTPUT, USERS_FILES, Layout, layouts
from tests.faults.report import counts, row_of, table
from tests.faults.runs import Outcome
from tests.faults.verdicts import KINDS, break_file

LINES = [{"kind": "train", "step": 2, "loss": 1.5, "seconds": 0.1}, {"kind": "eval", "step": 2}]


def finished_run(folder: Path) -> Path:
    """A folder as a run leaves it."""
    output = folder / OUTPUT
    (output / "checkpoints/step-000003").mkdir(parents=True)
    (output / "checkpoints/step-000003/state.json").write_text("{}")
    (output / "checkpoints/step-000003/finished").touch()
    (output / "model.safetensors").write_bytes(b"weights")
    (output / "config.json").write_text(f'{{"base": "{folder.resolve()}/model"}}')
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    for name, text in USERS_FILES.items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(text)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return finished_run(tmp_path / "run")


@pytest.fixture
def reference(tmp_path) -> Results:
    return Results.of(finished_run(tmp_path / "reference") / OUTPUT)


def outcome(*codes: int, stderr: str = "", stdout: str = "", **more: bool) -> Outcome:
    return Outcome(codes, stdout, stderr, 1.0, **more)


def test_the_same_results_in_another_folder_and_at_another_time_are_the_same(run, reference):
    lines = [{**LINES[0], "seconds": 7.0}, LINES[1]]
    (run / OUTPUT / "metrics.unfinished.jsonl").write_text("of a start before the first checkpoint")
    (run / OUTPUT / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert judge.finished(run, reference) == []


def test_one_bit_of_a_weight_is_a_difference(run, reference):
    break_file(run / OUTPUT / "model.safetensors", "end")
    assert judge.finished(run, reference) == ["model.safetensors differs"]


def test_one_figure_is_a_difference(run, reference):
    path = run / OUTPUT / "metrics.jsonl"
    path.write_text(path.read_text().replace("1.5", "1.5000001"))
    assert judge.finished(run, reference) == ["metrics of step 2 differ in loss"]
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert "1 lines of metrics, not 2" in judge.finished(run, reference)


@pytest.mark.parametrize(
    "name",
    [".out.1234.tmp/model.safetensors", "out/checkpoints/.step-000006.tmp/a", "cache/k.tmp/b"],
)
def test_what_is_left_behind_is_named(run, reference, name):
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text("")
    assert judge.finished(run, reference) == [f"{Path(name).parent} is left"]


def test_a_run_that_does_not_note_its_end_is_noticed(run, reference):
    (run / OUTPUT / "checkpoints/step-000003/finished").unlink()
    assert judge.finished(run, reference) == [
        "no note at the newest checkpoint that the run has ended"
    ]


def test_a_mixture_of_two_models_is_noticed(run):
    output = run / OUTPUT
    new, old = judge.digests(output), {"config.json": "1", "model.safetensors": "2"}
    assert judge.mixture(output, [old, new]) == []
    (output / "tokenizer.json").write_text("the old one's")
    (text,) = judge.mixture(output, [old, new])
    assert text == "a mixture of models: config.json, model.safetensors, tokenizer.json"
    (output / "config.json").unlink()  # what is left is no model
    assert judge.mixture(output, [old, new]) == []


@pytest.mark.parametrize("name", USERS_FILES)
def test_a_file_of_the_users_is_missed(run, reference, name):
    (run / OUTPUT / name).unlink()
    assert judge.finished(run, reference) == [f"the user's {name} is lost"]


def test_a_run_may_say_one_line_and_no_traceback():
    line = "train: 3/12\r\rerror: out: no space left; free some\n"
    trace = "Traceback (most recent call last):\n  File\nOSError: [Errno 28]\n"
    assert judge.spoken(outcome(2, 2, stderr=line), {2}) == []
    assert judge.spoken(outcome(0), {0}) == []
    assert judge.spoken(outcome(1, stderr=trace), {2}) == [
        "exit (1,), wanted [2]",
        "traceback (OSError: [Errno 28])",
    ]
    assert judge.spoken(outcome(2, 2, stderr=line + line), {2})[0].startswith("2 error lines")
    assert judge.spoken(outcome(2), {2}) == ["exit 2 without a line"]
    hung = judge.spoken(outcome(-9, hung=True, left=True), {-9})
    assert hung == ["hung; killed after 1 s", "a process outlived its ranks"]


def test_going_back_behind_a_saved_step_is_a_loss():
    at_3 = outcome(0, stdout="x\nresumed from out/checkpoints/step-000003 at step 3\n")
    assert judge.went_back(at_3, 3) == [] == judge.went_back(outcome(0), 0)
    assert judge.went_back(at_3, 6) == ["resumed at step 3, step 6 had been saved"]
    assert judge.went_back(outcome(0), 3) == ["resumed at step 0, step 3 had been saved"]


@pytest.mark.parametrize(
    "how, content",
    [
        ("first", b"01\x332345678"[:2] + b"\x33" + b"3456789"),
        ("middle", b"01234\x346789"),
        ("end", b"012345678\x38"),
        ("truncate", b"01234"),
    ],
)
def test_damage_to_a_file(tmp_path, how, content):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    break_file(path, how)
    assert path.read_bytes() == content
    break_file(path, "remove")
    assert not path.exists()


def test_a_cases_name_is_all_of_it():
    for case in (*long_form(), *middle_form()):
        again = Case.named(case.name)
        assert again == case and case.kind in KINDS
        assert again.random().random() == case.random().random()
    assert Layout.named("sft-adapter-z2-r1") == Layout("sft-adapter", 2, 1)


def test_the_long_form_is_as_long_as_it_says():
    cases = long_form()
    assert len({case.name for case in cases}) == len(cases)
    kinds = [case.kind for case in cases]
    assert kinds.count("kill") >= 200  # of one to three kills each: more than 300
    assert sum(case.words[0] == "ENOSPC" for case in cases) >= 30
    assert kinds.count("signal") >= 20
    for part in (cases[: len(cases) // 2], cases):  # cut short, too, it tries all layouts alike
        kills = Counter(case.layout.name for case in part if case.kind == "kill")
        main = {kills[layout.name] for layout in layouts(("sft", "reward", "dpo", "ppo"))}
        assert min(main) >= max(main) - 1 and min(main) >= len(part) // 100
        assert len(kills) == 6 * len({case.layout.program for case in part})


def test_the_table_counts_faults_by_row():
    verdicts = [
        {"case": "sft-z0-r1 kill 1", "result": "bit for bit", "faults": 2, "starts": 3},
        {"case": "sft-z0-r1 kill 2", "result": "failed", "faults": 1, "starts": 2},
        {
            "case": "sft-z0-r1 damage cache end cache/a",
            "result": "refused",
            "faults": 1,
            "starts": 1,
        },
    ]
    for verdict in verdicts:
        verdict["complaints"] = ["lost"] if verdict["result"] == "failed" else []
    everything = counts(verdicts)
    assert everything["layouts"] == {"sft": {"z0-r1": [3, 1]}}
    found = everything["rows"]
    expected = {"cases": 2, "starts": 5, "faults": 3, "results": {"bit for bit": 1}, "failed": 1}
    assert found["kill"] == expected
    assert "| SIGKILL of all ranks | 2 | 3 | 5 | 1 bit for bit | 1 |" in table(everything)
    assert "| sft | 3 + 1 | 0 + 0 |" in table(everything)
    assert "(EIO)" not in table(everything)  # none was tried
    assert row_of("sft-z0-r1 error EIO 3") == "error EIO" and found["damage cache"]["cases"] == 1
