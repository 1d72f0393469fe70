"""The page of a run: what it shows, that it stands alone, and that nothing in it runs."""

import itertools
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from dschat.config import SFTSettings
from dschat.errors import UserError
from dschat.report import __main__ as program
from dschat.report.drawing import distributions, png, svg
from dschat.report.page import write_page
from dschat.report.panels import PANELS, drawn
from dschat.report.records import read
from dschat.train import run_page
from dschat.train.metrics import LogConfig, MetricLogger
from dschat.train.pair_report import PairReport, ScoredPairs
from dschat.train.run_page import RunPage

GRPO = {"advantage_estimator": "grpo"}
EVIL = "<script>alert(1)</script>\x1b[2J\u202e"


def answer(iteration: int, prompt: str, text: str, reward: float | None) -> dict:
    return {
        "iteration": iteration,
        "prompt": prompt,
        "answer": text,
        "reward": reward,
        "kl": 1.5,
        "length": 7,
        "ended": iteration > 0,
    }


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three iterations of PPO, two evaluations of two prompts, and a line that is half written."""
    figures = {"lr/actor/lora_B": 1e-3, "kl_per_token": 0.1, f"lr/{EVIL}": 1.0}
    train = [{"kind": "train", "step": i, "reward": i / 2, **figures} for i in (1, 2, 3)]
    held_out = [
        {"kind": "eval", "step": 0, "reward": 0.25, "answers": 2},
        {"kind": "eval", "step": 3, "reward": 1234.5, "kl_per_token": "nan", "answers": 2},
    ]
    warning = {"kind": "warning", "step": 2, "text": f"the reward is gamed {EVIL}"}
    write_lines(tmp_path / "metrics.jsonl", [held_out[0], *train, warning, held_out[1]])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    answers = [answer(0, "\n\none", "before", -1.0), answer(0, EVIL, "text", None)]
    answers += [answer(3, "\n\none", f"after {EVIL}", 2.0), answer(3, EVIL, "text", None)]
    write_lines(tmp_path / "held_out_answers.jsonl", answers)
    description = {"program": "ppo", "settings": {"data_path": [EVIL], "kl_coef": 0.1}}
    (tmp_path / "run.json").write_text(json.dumps(description))
    return tmp_path


class Reader(HTMLParser):
    """Elements, what they point to, and the page's text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.targets: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = ("src", "href", "xlink:href", "action", "data")
        self.targets += [value or "" for name, value in attrs if name in names]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_stands_alone_and_nothing_in_it_runs(folder: Path):
    text = write_page(folder).read_text(encoding="utf-8")
    page = Reader(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    assert all(target.startswith("#") for target in page.targets)
    assert not re.search(r"@import|url\((?!#)", text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    shown = " ".join(page.text)
    assert shown.count(r"<script>alert(1)</script>\x1b[2J\u202e") == 6  # as text, escaped


def test_what_the_page_says(folder: Path):
    write_page(folder)
    shown = " ".join(" ".join(Reader((folder / "report.html").read_text()).text).split())
    assert shown.startswith(f"Step 3, PPO: {folder.name}")
    assert "before (step 0) after (step 3) reward 0.25 1,234" in shown
    assert "step 2 the reward is gamed" in shown
    assert (
        "iteration 0: before PPO iteration 3 one before reward -1, KL 1.5, 7 tokens, not ended"
        in shown
    )
    assert (
        '<td class="text"><div dir="auto" tabindex="0">one</div></td>'
        in (folder / "report.html").read_text()
    )
    assert "reward 2, KL 1.5, 7 tokens" in shown and "no reward, KL 1.5" in shown
    assert "kl_coef 0.1" in shown
    pictures = sorted(path.name for path in (folder / "figures").iterdir())
    assert pictures == [
        "kl_to_the_reference_nats_a_token.png",
        "learning_rates.png",
        "reward.png",
        "rewards_before_and_after.png",
    ]
    assert all((folder / "figures" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)


def test_prompts_are_shown_once_and_the_base_answers_beside(folder: Path):
    again = [answer(0, "\n\none", "again", 0.5), answer(0, "other", "mine", 0.5)]
    with (folder / "held_out_answers.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in again))
    base = {"prompt": "other", "answer": "of the base", "reward": -3.0, "length": 2, "ended": True}
    write_lines(folder / "base_answers.jsonl", [base])
    text = write_page(folder).read_text()
    assert "again" not in text and "mine" in text
    assert "<th>base</th><th>iteration 0: before PPO</th><th>iteration 3</th>" in text
    shown = " ".join(" ".join(Reader(text).text).split())
    assert "of the base reward -3, 2 tokens mine reward 0.5, KL 1.5" in shown


def test_the_calibration_of_a_reward_model(folder: Path):
    scores = torch.tensor([[2.0, 1.0], [1.0, -1.0], [0.5, 1.0]], dtype=torch.float64)
    lengths = torch.ones(3, dtype=torch.float64)
    report = PairReport.of(ScoredPairs(scores[:, 0], scores[:, 1], lengths, lengths))
    (folder / "evaluation.json").write_text(report.text({}))
    text = write_page(folder).read_text(encoding="utf-8")
    shown = " ".join(" ".join(Reader(text).text).split())
    # Two of three pairs are right, one of each bin's confidence: 0.731, 0.881, 0.622.
    assert "Calibration of the reward model" in shown and "3 pairs, accuracy 0.667, ECE" in shown
    assert (folder / "figures" / "calibration.png").read_bytes()[:4] == b"\x89PNG"
    (folder / "evaluation.json").write_text('{"reliability": [{"low": 1}], "figures": {}}')
    with pytest.raises(UserError, match="what the run wrote is damaged"):
        program.main([str(folder)])


def test_the_same_run_makes_the_same_page(folder: Path):
    assert write_page(folder).read_bytes() == write_page(folder).read_bytes()


def read_with(folder: Path, line: dict) -> dict[str, list[tuple[int, float]]]:
    """Points of training with one line more than the folder has."""
    other = folder / "other"
    other.mkdir()
    lines = (folder / "metrics.jsonl").read_text().rpartition("\n")[0]
    (other / "metrics.jsonl").write_text(f"{lines}\n{json.dumps(line)}\n")
    return read(other).train


def test_figures_that_are_not_finite_and_half_lines_are_left_out(folder: Path):
    records = read(folder)
    assert records.held_out == {"reward": [(0, 0.25), (3, 1234.5)], "answers": [(0, 2), (3, 2)]}
    (gap,) = read_with(folder, {"kind": "train", "step": 4, "reward": "inf"})["reward"][3:]
    assert gap[0] == 4 and math.isnan(gap[1])  # a gap of the line
    assert records.train["reward"] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert [panel.title for panel in drawn(records)] == [
        "Reward",
        "KL to the reference, nats a token",
        "Learning rates",
    ]


def test_a_curve_breaks_where_it_has_no_number_and_a_long_legend_covers_none(tmp_path: Path):
    from dschat.report.drawing import curve

    names = [f"rewards/function {n}" for n in range(6)]
    values = [1.0, 2.0, "nan", 4.0, 5.0]
    lines = [{"kind": "train", "step": i} | dict.fromkeys(names, v) for i, v in enumerate(values)]
    lines[0]["entropy"] = 1.0
    lines[1]["entropy"] = "nan"  # one number makes no curve
    write_lines(tmp_path / "metrics.jsonl", lines)
    (panel,) = drawn(read(tmp_path))
    figure = curve(panel, read(tmp_path))
    svg(figure)  # the layout is found when it is drawn
    (axes,) = figure.axes
    drawn_at = axes.get_lines()[0].get_xydata()
    assert [math.isnan(y) for _, y in drawn_at] == [False, False, True, False, False]
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 6 and axes.get_legend() is None
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_one_step_beside_held_out_points_is_seen(tmp_path: Path):
    """A short run writes the figures of one step, of which a line alone would show nothing."""
    from dschat.report.drawing import curve

    lines = [{"kind": "eval", "step": i, "loss": 2.0 - i} for i in (0, 1)]
    write_lines(tmp_path / "metrics.jsonl", [*lines, {"kind": "train", "step": 1, "loss": 1.5}])
    (panel,) = drawn(read(tmp_path))
    (axes,) = curve(panel, read(tmp_path)).axes
    assert [line.get_marker() for line in axes.get_lines()] == ["s", "o"]


@pytest.mark.parametrize("decades", [0.3, 0.9, 1.6, 4.0])
def test_numbers_of_a_logarithmic_axis_keep_apart(decades: float, tmp_path: Path):
    from dschat.report.drawing import curve

    rates = (1e-3, 1e-3 / 10**decades)
    lines = [{"kind": "train", "step": i, "lr/actor/A": rate} for i, rate in enumerate(rates)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    (panel,) = drawn(read(tmp_path))
    figure = curve(panel, read(tmp_path))
    png(figure)
    ticks = [*figure.axes[0].yaxis.get_major_ticks(), *figure.axes[0].yaxis.get_minor_ticks()]
    low, high = sorted(figure.axes[0].get_ylim())
    texts = [t.label1 for t in ticks if t.label1.get_text() and low <= t.get_loc() <= high]
    boxes = sorted((text.get_window_extent() for text in texts), key=lambda box: box.y0)
    assert boxes and all(a.y1 < b.y0 for a, b in itertools.pairwise(boxes)), texts


def test_a_run_is_called_by_its_estimator_and_says_what_rewards_it(tmp_path: Path):
    write_lines(tmp_path / "metrics.jsonl", [{"kind": "eval", "step": 0, "reward": 1.0}])
    settings = {"actor_model_name_or_path": "sft", "data_path": ["pairs"]}
    for more, title, models in (
        ({"critic_model_name_or_path": "scores"}, "Step 3, PPO", "sft · scores"),
        ({"reward_model_name_or_path": "scores"} | GRPO, "Step 3, GRPO", "sft · scores"),
        ({"reward_function": "m:f"} | GRPO, "Step 3, GRPO", "sft · m:f"),
    ):
        description = {"program": "ppo", "settings": settings | more}
        (tmp_path / "run.json").write_text(json.dumps(description))
        shown = " ".join(" ".join(Reader(write_page(tmp_path).read_text()).text).split())
        assert shown.startswith(f"{title}: {tmp_path.name}") and f"{models} · data: pairs" in shown


def test_names_of_pictures_are_their_own():
    assert len({panel.file for panel in PANELS}) == len(PANELS)


def test_one_part_of_the_reward_is_the_reward_again(tmp_path: Path):
    for parts, panels in (
        (["reward_model"], ["Reward"]),
        (["reward_model", "reward_function"], ["Reward", "Parts of the reward"]),
    ):
        figures = dict.fromkeys(["reward", *parts], 1.0)
        steps = [{"kind": "train", "step": i, **figures} for i in (1, 2)]
        write_lines(tmp_path / "metrics.jsonl", steps)
        assert [panel.title for panel in drawn(read(tmp_path))] == panels


def test_equal_rewards_and_names_with_a_dollar_can_be_drawn(tmp_path: Path):
    assert svg(distributions([1.0, 1.0], [1.0])).startswith("<svg ")
    lines = [{"kind": "train", "step": i, "rewards/$x_$": float(i)} for i in (1, 2)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    (panel,) = drawn(read(tmp_path))
    from dschat.report.drawing import curve

    assert png(curve(panel, read(tmp_path)))[:4] == b"\x89PNG"


def test_a_picture_is_drawn_once_a_format(monkeypatch):
    """With a layout to find each was drawn twice, and a run's page took half as long again."""
    from matplotlib.figure import Figure

    drawn_as, draw = [], Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda f, r: drawn_as.append(type(r)) or draw(f, r))
    figure = distributions([0.0, 1.0], [1.0, 2.0])
    assert svg(figure) and png(figure)
    assert len(drawn_as) == 2


def test_a_run_makes_its_page_at_evaluations_and_at_its_end(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(run_page, "FIRST", 0.0)
    settings = SFTSettings.of(model_name_or_path="some model", data_path=["rows"])
    log = MetricLogger(LogConfig(), tmp_path, 0, settings=settings)
    log.log(0, {"loss": 2.0}, kind="eval")
    assert (tmp_path / "report.html").exists()
    log.log(1, {"loss": 1.5})
    log.warn(1, "a rate is high")
    log.log(2, {"loss": 1.0}, kind="eval")  # too soon for another page
    assert "a rate is high" not in (tmp_path / "report.html").read_text()
    log.close()
    page = tmp_path / "report.html"
    assert capsys.readouterr().out == f"curves, warnings and answers: {page}\n"
    text = page.read_text()
    assert "a rate is high" in text and "some model" in text and "Step 1" in text
    assert read(tmp_path).description["settings"]["data_path"] == ["rows"]


def test_a_short_run_makes_its_page_once(tmp_path: Path):
    log = MetricLogger(LogConfig(), tmp_path, 0)
    log.log(0, {"loss": 2.0}, kind="eval")
    assert not (tmp_path / "report.html").exists()
    log.close()
    assert (tmp_path / "report.html").exists()


def test_without_a_page(tmp_path: Path):
    log = MetricLogger(LogConfig(no_report=True), tmp_path, 0)
    log.log(0, {"loss": 2.0}, kind="eval")
    log.close()
    MetricLogger(LogConfig(), tmp_path / "other", 1).close()  # another rank
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_page_that_cannot_be_made_ends_no_run(tmp_path: Path, capsys):
    (tmp_path / "metrics.jsonl").write_text("no JSON\n")
    RunPage(tmp_path, None).finish()
    assert capsys.readouterr().out.startswith("no report.html: ValueError: metrics.jsonl line 1: ")


def test_the_command(folder: Path, tmp_path: Path, capsys):
    program.main([str(folder)])
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    with pytest.raises(
        UserError, match=r"nowhere: holds no metrics\.jsonl; give the output folder"
    ):
        program.main([str(tmp_path / "nowhere")])
    (folder / "metrics.jsonl").write_text('{"kind": "train"}\n')
    with pytest.raises(UserError, match="what the run wrote is damaged: KeyError: 'step'"):
        program.main([str(folder)])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metrics.jsonl", "[" * 100_000 + "\n", r"metrics.jsonl line 1: nested too deeply"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl line 1: holds no JSON object"),
        ("metrics.jsonl", '{"kind": "eval", "step": 1e999}\n', "OverflowError: "),
        ("held_out_answers.jsonl", "\xff\n", "held_out_answers.jsonl line 1: Expecting value"),
        ("run.json", '{"settings": 3}', "AttributeError: "),
        ("run.json", "null", "run.json: holds no JSON object"),
        ("run.json", None, r".*run\.json: is a pipe or a device; put a file in its place"),
    ],
)
def test_a_damaged_record_is_one_line(folder: Path, name: str, text: str | None, words: str):
    if text is None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    else:
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"what the run wrote is damaged: {words}") as error:
        program.main([str(folder)])
    assert "\n" not in str(error.value)
