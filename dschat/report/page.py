"""The page itself: text and tables by Jinja2 around the curves, which are PNG files as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dschat.functional.proportions import ReliabilityBin
from dschat.report.html import BASE, fill, put_in_place
from dschat.report.panels import PANELS, drawn
from dschat.report.records import Records, read

PAGE = "report.html"
PICTURES = "figures"  # folder of the PNG files
MOST_PROMPTS, MOST_ITERATIONS = 8, 5  # of the table of answers
PHASES = "Time and memory by phase"
HIDDEN = {"answers", "decode_gap", "decode_gap_max"}  # among what it came to
MODELS = (  # settings that say what was trained, and by whose rewards
    *("model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path"),
    *("reward_model_name_or_path", "reward_function"),
)
PROGRAMS = {
    "sft": "Step 1, supervised fine-tuning",
    "reward": "Step 2, reward model",
    "dpo": "Preference optimisation",
    "ppo": "Step 3, PPO",
}


def write_page(folder: str | Path) -> Path:
    """Make OUTPUT/report.html and the pictures beside it from what the run has written so far.

    Returns:
        The page's path. Each file takes its place in one step.

    Raises:
        FileNotFoundError: the folder has no metrics.
    """
    folder = Path(folder)
    records = read(folder)
    from dschat.report import drawing  # matplotlib takes a second to import

    pictures, curves = {}, []
    for panel in drawn(records):
        figure = drawing.curve(panel, records)
        curves.append({"title": panel.title, "svg": drawing.svg(figure)})
        pictures[panel.file] = drawing.png(figure)
    scores = list(_scores(records))
    if len(scores) > 1:
        figure = drawing.distributions(scores[0], scores[-1])
        title = "Rewards of held-out answers, before and after"
        curves.append({"title": title, "svg": drawing.svg(figure)})
        pictures["rewards_before_and_after"] = drawing.png(figure)
    if bins := records.evaluation.get("reliability"):
        figure = drawing.reliability(
            [ReliabilityBin(**part) for part in bins], records.evaluation["figures"]
        )
        title = "Calibration of the reward model"
        curves.append({"title": title, "svg": drawing.svg(figure)})
        pictures["calibration"] = drawing.png(figure)
    for name, data in pictures.items():
        put_in_place(folder / PICTURES / f"{name}.png", data)
    text = render(records, str(folder.resolve().name), curves)
    put_in_place(folder / PAGE, text.encode())
    return folder / PAGE


def render(records: Records, name: str, curves: Sequence[Mapping[str, str]]) -> str:
    """Fill the template.

    Args:
        name: of the output folder. curves: `title` and `svg` of each.
    """
    from markupsafe import Markup

    steps = [step for points in records.held_out.values() for step, _ in points] or [0]
    iterations = _chosen(sorted(records.answers))
    context = {
        "title": f"{_program(records)}: {name}",
        "subtitle": _subtitle(records),
        "figures": list(_before_and_after(records)),
        "first": min(steps),
        "last": max(steps),
        "warnings": records.warnings,
        "curves": [{"title": c["title"], "svg": Markup(c["svg"])} for c in curves],
        "columns": list(_titles(records, iterations)),
        "answers": list(_side_by_side(records, iterations)),
        "opened": PHASES,
        "tables": [(title, rows) for title, rows in _tables(records) if rows],
    }
    return fill(BASE / "page.html.j2", context)


def _subtitle(records: Records) -> str:
    settings = records.description.get("settings", {})
    parts = [_listed(settings[name]) for name in MODELS if settings.get(name)]
    if data := settings.get("data_path"):
        parts.append(f"data: {_listed(data)}")
    return " · ".join(parts)


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def _program(records: Records) -> str:
    """Name the program; step 3 is called by its estimator, and PPO where a critic has a part."""
    program = records.description.get("program", "")
    estimator = records.description.get("settings", {}).get("advantage_estimator", "gae")
    if program == "ppo" and estimator != "gae":
        return f"Step 3, {str(estimator).upper()}"
    return PROGRAMS.get(program, "Run")


def _before_and_after(records: Records) -> Iterator[dict[str, str]]:
    order = [name for panel in PANELS for name, _, _ in panel.lines(records)]
    names = sorted(records.held_out.keys() - HIDDEN)
    for name in sorted(names, key=lambda n: order.index(n) if n in order else len(order)):
        points = records.held_out[name]
        before, after = (f"{value:,.4g}" for _, value in (points[0], points[-1]))
        yield {"name": name, "before": before, "after": after}


def _scores(records: Records) -> Iterator[list[float]]:
    """Rewards of the held-out answers of each evaluation; those without one are left out."""
    for iteration in sorted(records.answers):
        found = [a["reward"] for a in records.answers[iteration] if a["reward"] is not None]
        if found:
            yield found


def _chosen(iterations: list[int]) -> list[int]:
    """Choose the first, the last and some between them."""
    if len(iterations) <= MOST_ITERATIONS:
        return iterations
    last = len(iterations) - 1
    return [iterations[round(i * last / (MOST_ITERATIONS - 1))] for i in range(MOST_ITERATIONS)]


def shown_prompts(answers: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Choose the first prompts of an evaluation by their places, each once."""
    chosen: dict[int, str] = {}
    for place, prompt in enumerate(answer["prompt"] for answer in answers):
        if prompt not in chosen.values() and len(chosen) < MOST_PROMPTS:
            chosen[place] = prompt
    return chosen


def _titles(records: Records, iterations: Sequence[int]) -> Iterator[str]:
    """Yield a title for each column of answers."""
    if records.base_answers:
        yield "base"
    for iteration in iterations:
        yield f"iteration {iteration}" + (": before PPO" if iteration == 0 else "")


def _side_by_side(records: Records, iterations: Sequence[int]) -> Iterator[dict[str, Any]]:
    if not iterations:
        return
    for place, prompt in shown_prompts(records.answers[iterations[0]]).items():
        row: list[dict[str, str] | None] = []
        if records.base_answers:
            base = records.base_answers.get(prompt)
            row.append(None if base is None else _answer(base))
        for iteration in iterations:
            answers = records.answers[iteration]
            same = place < len(answers) and answers[place]["prompt"] == prompt
            row.append(_answer(answers[place]) if same else None)
        yield {"prompt": prompt.strip(), "answers": row}


def _answer(answer: Mapping[str, Any]) -> dict[str, str]:
    reward = "no reward" if answer["reward"] is None else f"reward {answer['reward']:.3g}"
    ended = "" if answer["ended"] else ", not ended"
    kl = f"KL {answer['kl']:.3g}, " if "kl" in answer else ""  # the base is not measured
    figures = f"{reward}, {kl}{answer['length']} tokens{ended}"
    return {"text": answer["answer"].strip(), "figures": figures}


def _tables(records: Records) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    figures = records.evaluation.get("figures", {})
    yield "Closing evaluation", [(name, f"{value}") for name, value in figures.items()]
    yield PHASES, list(_phases(records))
    settings = records.description.get("settings", {})
    yield "Settings", [(name, str(settings[name])) for name in sorted(settings)]
    yield "Versions", [(n, str(v)) for n, v in records.description.get("versions", {}).items()]


def _phases(records: Records) -> Iterator[tuple[str, ...]]:
    """Rows of the run's parts: seconds, their share, what raised the peak of memory to how much."""
    parts = records.description.get("phases", {})
    total = sum(part["seconds"] for part in parts.values())
    for name, part in parts.items():
        peak = f"peak memory {part['peak_gib']:.2f} GiB" if part["peak_gib"] else ""
        share = part["seconds"] / max(total, 0.1)
        yield name, f"{part['seconds']:,.1f} s", f"{share:.0%}", peak
