"""Where a run's time goes: parts in the order in which they came, and what raised the peak."""

import json
import re
from pathlib import Path

from dschat.config import SFTSettings
from dschat.report.page import write_page
from dschat.train import phases
from dschat.train.metrics import LogConfig, MetricLogger

GIB = 2**30


def test_seconds_add_up_and_a_part_is_named_for_the_peak_that_it_raised(monkeypatch):
    times, peaks = iter([10.0, 13.0, 14.0, 16.0, 20.0]), iter([GIB, 3 * GIB, 2 * GIB, 4 * GIB])
    monkeypatch.setattr("dschat.train.phases.time.perf_counter", lambda: next(times))
    monkeypatch.setattr(phases, "peak_bytes", lambda: next(peaks))
    counted = phases.Phases()
    for name in ("start", "evaluation", "training", "evaluation"):
        counted.mark(name)
    assert counted.table() == {
        "start": {"seconds": 3.0, "peak_gib": 1.0},
        "evaluation": {"seconds": 5.0, "peak_gib": 4.0},  # 14 - 13 and 20 - 16
        "training": {"seconds": 2.0, "peak_gib": 0.0},
    }


def test_the_page_of_a_run_shows_them(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(phases, "peak_bytes", lambda: 2 * GIB)
    phases.begin()
    settings = SFTSettings.of(model_name_or_path="m", data_path=["rows"])
    log = MetricLogger(LogConfig(), tmp_path, 0, settings=settings)
    log.log(0, {"loss": 2.0}, kind="eval")
    log.close()
    described = json.loads((tmp_path / "run.json").read_text())
    assert list(described["phases"]) == ["start", "saving the model"]
    described["phases"] = {
        "start": {"seconds": 30.0, "peak_gib": 1.5},
        "training": {"seconds": 90.0, "peak_gib": 0.0},
    }
    (tmp_path / "run.json").write_text(json.dumps(described))
    text = write_page(tmp_path).read_text(encoding="utf-8")
    shown = " ".join(re.sub("<[^>]+>", " ", text).split())
    assert "start 30.0 s 25% peak memory 1.50 GiB training 90.0 s 75% " in shown
    del described["phases"]  # of an older run
    (tmp_path / "run.json").write_text(json.dumps(described))
    assert "by phase" not in write_page(tmp_path).read_text(encoding="utf-8")
