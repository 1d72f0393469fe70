"""The LoRA+ grid: what is run and not run twice, who wins, what is said and drawn."""

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import lora_plus_grid
from benchmarks.lora_plus import bench as bench_module
from benchmarks.lora_plus import report
from benchmarks.lora_plus.heat_map import BEST, BEST_EQUAL, DIVERGED, heat_map
from benchmarks.lora_plus.settings import GridSettings
from benchmarks.lora_plus.training import Outcome, Run
from dschat.errors import UserError

BUDGET = 20
SVG = "{http://www.w3.org/2000/svg}"


def line(*losses: float | None, ratio: float = 1.0, first: int = -10) -> report.Grid:
    """One diagonal, from eta_A = 2^first upward."""
    return {(2.0 ** (first + i), ratio * 2.0 ** (first + i)): x for i, x in enumerate(losses)}


def bowl(run: Run) -> Outcome:
    """2 + 0.1 ((log2 eta_A + 8)^2 + (log2 eta_B + 6)^2), less as steps go by; full: around 2^-10.

    The valley's floor is at lambda = 4; lambda 1 and 16 are 0.2 above it. From 2^-3 B diverges.
    """
    a, b = math.log2(run.eta_A), math.log2(run.eta_B)
    if run.init == "full":
        return Outcome(1.0 + (a + 10) ** 2, ((run.steps, 1.0),))
    if b >= -3:
        return Outcome(None, ())
    floor = 2.0 + 0.1 * ((a + 8) ** 2 + (b + 6 + (run.alpha > 1)) ** 2)
    steps = range(run.eval_every, run.steps, run.eval_every) if run.eval_every else ()
    curve = [(step, floor + 0.5 * (1 - step / BUDGET)) for step in (*steps, run.steps)]
    return Outcome(curve[-1][1], tuple(curve))


def start(folder: Path, monkeypatch, *flags: str) -> dict:
    """The benchmark's entry point on a small lattice; its summary."""
    argv = ["lora_plus_grid", "--output_dir", str(folder), "--figures_dir", str(folder / "figures")]
    argv += ["--steps", str(BUDGET), "--eta_A", "-9", "-7", "--eta_B", "-7", "-5", *flags]
    monkeypatch.setattr("sys.argv", argv)
    lora_plus_grid.main()
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def trained(monkeypatch) -> list[Run]:
    """Runs "trained" on the bowl, in order; no model is made."""
    done: list[Run] = []

    def fake(task, run, rank, batch_size):
        done.append(run)
        return bowl(run)

    monkeypatch.setattr(bench_module, "train_once", fake)
    monkeypatch.setattr(bench_module.Bench, "_load", lambda self: None)
    return done


def test_winners_are_found_inside_the_grid_and_judged_on_fresh_seeds(
    tmp_path, monkeypatch, trained, capsys
):
    summary = start(tmp_path, monkeypatch, "--init", "A")
    assert summary["full"]["best"] == 2.0**-10  # the scan starts there and has grown by 2^-11
    assert summary["full"]["rates"][0]["eta"] == 2.0**-11
    found = summary["init"]["A"]
    rows = {row["ratio"]: row for row in found["per_ratio"]}
    assert rows[1]["eta_A"] == 2.0**-7 and rows[16]["eta_A"] == 2.0**-9
    assert not any(rows[ratio]["on_edge"] for ratio in (1, 2, 4, 8, 16))
    assert rows[4]["over_full"] == 4.0  # 2^-8 / 2^-10
    best = found["winners"]["any"]
    assert (best["eta_A"], best["eta_B"], best["loss"]) == (2.0**-8, 2.0**-6, 2.0)
    # 2 + 0.5 (1 - t / 20) = 2.2 at t = 12, along the curve and from schedule to schedule
    against = best["against"]
    assert against["target"] == pytest.approx(2.2)
    assert against["steps_on_curve"] == pytest.approx(12)
    assert against["steps_of_schedule"] == pytest.approx(12)
    assert [steps for steps, _ in against["schedules"]] == [5, 10, 15, 20]
    assert against["gain"]["mean"] == pytest.approx(0.2)
    assert found["winners"]["16"]["against"]["steps_of_schedule"] == pytest.approx(20)
    fresh = {run.seed for run in trained if run.eval_every or run.steps < BUDGET}
    assert fresh == {11, 12, 13}
    alphas = {(row["ratio"], row["alpha"]): row for row in found["alpha"]}
    assert set(alphas) == {(1, 1), (1, 2), (16, 1), (16, 2)}
    assert alphas[1, 1]["loss"] == pytest.approx(2.2)  # 2^-7: 0.1 (1 + 1)
    assert alphas[1, 2]["loss"] == pytest.approx(2.1)  # 2^-7 and 2^-8: 0.1 (1 + 0)
    text = capsys.readouterr().out
    assert "| any | 4 | 3.91e-03 (2^-8) | 2.0000 | 2.0000 ± 0.0000 (3) |" in text
    assert "12 of 20 (60 %)" in text


def test_given_lambdas_are_run_alone(tmp_path, monkeypatch, trained):
    """From one cell each, eta_A = 2^-7 at lambda 1 and 2^-9 at 16, to the one on either side."""
    flags = ("--init", "A", "--ratios", "1", "16")
    summary = start(tmp_path, monkeypatch, *flags)
    found = summary["init"]["A"]
    assert {run.ratio for run in trained} == {1.0, 16.0} and found["alpha"] == []
    assert {run.steps for run in trained} == {BUDGET} and summary["full"]["rates"] == []
    lines = (tmp_path / "figures/lora_plus_embedded_initA.csv").read_text().splitlines()
    assert lines[0] == "ratio,eta_A,loss,lowest,highest,accuracy"
    assert len(lines) == 7 and lines[2] == "1,0.0078125,2.2000,2.2000,2.2000,"
    assert not (tmp_path / "figures/lora_plus_embedded_initA.svg").exists()


def test_a_stopped_benchmark_goes_on_and_repeats_nothing(tmp_path, monkeypatch, trained):
    first = start(tmp_path, monkeypatch)
    assert len(trained) == len(set(trained))
    count = len(trained)
    file = tmp_path / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + count
    file.write_text("".join(lines[:-2]) + lines[-2][:40])  # killed while writing a line
    assert start(tmp_path, monkeypatch) == first
    assert trained[count:] == trained[count - 2 : count]
    assert start(tmp_path, monkeypatch) == first
    assert len(trained) == count + 2


def test_results_of_other_settings_are_not_mixed(tmp_path, monkeypatch, trained):
    start(tmp_path, monkeypatch, "--init", "A")
    with pytest.raises(UserError, match="with rank 8, not 4: give another --output_dir"):
        start(tmp_path, monkeypatch, "--init", "A", "--rank", "4")


def test_a_lattice_that_diverges_everywhere_is_an_error(tmp_path, monkeypatch, trained):
    flags = ("--init", "B", "--eta_A", "-3", "-2", "--eta_B", "0", "1")
    with pytest.raises(UserError, match="every cell of init B diverged"):
        start(tmp_path, monkeypatch, *flags)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": ["A", "C"]}, "--init C"),
        ({"rank": 0}, "--rank 0"),
        ({"steps": 3}, "--steps 3"),
        ({"fresh_seeds": [9, 2]}, "--fresh_seeds 2 is a seed of the grid"),
        ({"eta_B": [-3, -4]}, "--eta_B -3 -4: give the smaller"),
        ({"task": "hh", "data_path": "x"}, "--task hh needs --model_name_or_path"),
        ({"data_path": "x"}, "--task embedded brings its own"),
        ({"ratios": [3]}, "--ratios 3: the lattice has powers of two"),
    ],
)
def test_bad_settings_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        GridSettings(output_dir="out", **changes)


def test_a_diverged_seed_makes_a_diverged_cell():
    cells = [(0.5, 0.5), (0.25, 0.25)]
    results = {
        Run("A", a, b, seed, BUDGET): Outcome(loss, ())
        for (a, b), losses in zip(cells, [(1.0, 3.0), (0.1, None)], strict=True)
        for seed, loss in enumerate(losses)
    }
    means = report.grid_means(results, "A", cells, [0, 1], BUDGET)
    assert means == {(0.5, 0.5): 2.0, (0.25, 0.25): None}
    assert report.best_cell(means) == (0.5, 0.5)
    assert report.best_cell({(0.5, 0.5): None}) is None


def test_a_line_grows_at_the_end_that_is_best():
    assert report.cell_beyond(line(1.0, 2.0, 3.0), 1.0) == (2.0**-11, 2.0**-11)
    assert report.cell_beyond(line(3.0, 2.0, 1.0, ratio=4.0), 4.0) == (2.0**-7, 2.0**-5)
    assert report.cell_beyond(line(2.0, 1.0, 2.0), 1.0) is None
    assert report.cell_beyond(line(2.0, 1.0, None), 1.0) is None
    assert report.cell_beyond(line(2.0, 1.0), 2.0) is None  # no cell of that lambda


def test_basin_width_in_factors_of_two():
    # limit 1.02: down 1 + (1.02 - 1.01) / 0.09 cells, up (1.02 - 1.00) / 0.04
    width, is_open = report.basin_width(line(1.10, 1.01, 1.00, 1.04, None), 1.0)
    assert width == pytest.approx(1 + 1 / 9 + 0.5) and not is_open
    width, is_open = report.basin_width(line(1.01, 1.00, 1.03), 1.0)
    assert width == pytest.approx(1 + 2 / 3) and is_open
    assert report.basin_width(line(1.2, 1.0, None), 1.0) == (pytest.approx(0.1), False)


def test_steps_to_reach_a_loss():
    curve = [(10, 3.0), (20, 2.0), (30, 1.0)]
    assert report.steps_to_reach(curve, 1.5) == 25
    assert report.steps_to_reach(curve, 1.0) == 30
    assert report.steps_to_reach(curve, 3.5) == 10
    assert report.steps_to_reach(curve, 0.9) is None
    assert report.mean_curve([[(1, 2.0), (2, 1.0)], [(1, 4.0), (2, 2.0)]]) == [(1, 3.0), (2, 1.5)]
    assert report.mean_curve([[(1, 2.0), (2, 1.0)], [(1, 4.0)]]) == []  # one diverged


def test_heat_map_marks_the_best_the_diagonal_and_what_diverged():
    losses = {(2.0**-8, 2.0**-8): 1.5, (2.0**-7, 2.0**-7): 1.4, (2.0**-8, 2.0**-6): 1.25}
    losses |= {(2.0**-7, 2.0**-6): 1.75, (2.0**-8, 2.0**-7): None}
    root = ET.fromstring(heat_map(losses, "a & b <c>"))
    texts = {text.text: text for text in root.iter(f"{SVG}text")}
    assert {"a & b <c>", "1.500", "1.250", "div.", "λ=4", "3.9e-03", "1.6e-02"} <= texts.keys()
    rects = list(root.iter(f"{SVG}rect"))

    def where(element, inset: float = 0.0) -> tuple[float, float]:
        return float(element.get("x")) - inset, float(element.get("y")) - inset

    cells = [rect for rect in rects if rect.get("stroke") == "#fff"]
    assert len(cells) == 5
    # in the order of the losses: columns 2^-8, 2^-7 to the right, rows 2^-8, 2^-7, 2^-6 upward
    places = dict(zip(losses, map(where, cells), strict=True))
    left, low = places[2.0**-8, 2.0**-8]
    assert places[2.0**-7, 2.0**-7] == (left + 62, low - 34)
    assert places[2.0**-8, 2.0**-6] == (left, low - 68)
    frames = [r for r in rects if r.get("fill") == "none" and r.get("width") != "150"]
    best = [where(frame) for frame in frames if frame.get("stroke") == BEST]
    equal = [where(frame, 3) for frame in frames if frame.get("stroke") == BEST_EQUAL]
    outlined = [where(frame) for frame in frames if frame.get("stroke") == "#000"]
    assert best == [places[2.0**-8, 2.0**-6]]
    assert equal == [places[2.0**-7, 2.0**-7]]
    assert outlined == [places[2.0**-8, 2.0**-8], places[2.0**-7, 2.0**-7]]
    assert cells[list(losses).index((2.0**-8, 2.0**-7))].get("fill") == DIVERGED
