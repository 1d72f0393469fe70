"""Win rate of one model over another, by a judge: with intervals, and at equal lengths.

    python -m dschat.winrate --candidates ./dpo ./sft --prompts ./test.jsonl --judge ./reward
    python -m dschat.winrate --candidates ./dpo answers.jsonl --prompts ./test.jsonl --judge ./chat

1. read the prompts; check every model and file
2. collect both candidates' answers, one to each prompt
3. let the judge compare them; a chat model is asked twice, in both orders
4. print the figures, write them with a row for each prompt
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from dschat.config.cli import check_flags
    from dschat.config.programs import WinRateSettings

    check_flags(WinRateSettings, __doc__)

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dschat.config.cli import parse, run_cli
from dschat.config.programs import WinRateSettings
from dschat.config.unused import tell_unused
from dschat.functional.length_control import length_controlled
from dschat.functional.proportions import wilson_interval
from dschat.models.save import check_output_dir
from dschat.rlhf.candidates import (
    Candidates,
    GivenAnswer,
    read_prompts,
)
from dschat.rlhf.judges import Verdicts, check_judge, load_judge
from dschat.settings import flag_values
from dschat.text.conversations import Example, Prompt
from dschat.train.metrics import format_value
from dschat.train.pair_report import half_ties
from dschat.utils.files import disk_errors_named
from dschat.utils.printable import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Compare two candidates."""
    settings = parse(WinRateSettings, argv, __doc__)
    tell_unused(settings)
    limits, judge_limits = settings.limits()

    # 1. all that can be wrong
    check_output_dir(settings.output_dir)
    check_judge(settings.judge, judge_limits)
    prompts = read_prompts(settings.prompts, settings.max_prompts, settings.read, "prompts")
    candidates = Candidates(settings.candidates, "candidates", prompts, limits, settings.read)

    # 2. answers
    first, second = candidates.answers()
    if settings.output_dir is not None:  # first of all: they cost the most
        write_answers(settings.output_dir, prompts, (first, second))

    # 3. verdicts
    judge = load_judge(settings.judge, judge_limits)
    print(printable(f"{settings.judge}: judges, as a {judge.kind}"), flush=True)
    verdicts = judge(prompts, first, second)

    # 4. figures
    figures = win_figures(verdicts, first, second)
    print(printable("\n".join(lines(settings, figures))))
    if settings.output_dir is not None:
        write_report(settings, figures, prompts, (first, second), verdicts)


def win_figures(
    verdicts: Verdicts, first: Sequence[GivenAnswer], second: Sequence[GivenAnswer]
) -> dict[str, Any]:
    """Sum up verdicts; ties count as half a win. Rates are of the first candidate."""
    wins = half_ties(verdicts.margin)
    count, won = len(wins), wins.sum().item()
    low, high = wilson_interval(won, count)
    tokens = verdicts.tokens
    equal = length_controlled(wins, tokens[0] - tokens[1])
    at_equal = (equal.win_rate, equal.low, equal.high, equal.slope) if equal else 4 * (None,)
    controlled = "length_controlled_win_rate"
    names = (controlled, f"{controlled}_low", f"{controlled}_high", "length_slope")
    figures: dict[str, Any] = {
        "prompts": count,
        "win_rate": won / count,
        "win_rate_low": low,
        "win_rate_high": high,
        "tie_share": (wins == 0.5).double().mean().item(),
        **dict(zip(names, at_equal, strict=True)),
        "margin": verdicts.margin.mean().item(),
        "tokens": [side.mean().item() for side in tokens],
        "ended": [sum(a.ended for a in side) / count for side in (first, second)],
    }
    if verdicts.orders is not None:
        forward, backward = verdicts.orders
        shown_first = half_ties(forward) + half_ties(-backward)  # of two questions
        figures["order_agreement"] = (forward * backward > 0).double().mean().item()
        figures["first_shown_wins"] = shown_first.mean().item() / 2
    return figures


def lines(settings: WinRateSettings, figures: dict[str, Any]) -> list[str]:
    """Write the figures for a terminal."""
    one, other = settings.candidates
    (mine, theirs), ended = figures["tokens"], figures["ended"]

    def rate(name: str) -> str:
        if figures[name] is None:
            return f"not known: one side is {abs(mine - theirs):.0f} tokens longer in all"
        low, high = figures[f"{name}_low"], figures[f"{name}_high"]
        return f"{figures[name]:.3f}, 95 % interval {low:.3f} to {high:.3f}"

    shown = [
        f"{one} against {other}, {figures['prompts']} prompts, judged by {settings.judge}",
        f"win rate                 {rate('win_rate')} (ties {figures['tie_share']:.3f})",
        f"win rate, equal lengths  {rate('length_controlled_win_rate')}",
        f"tokens of an answer      {format_value(mine)} against {format_value(theirs)}; ended "
        f"{ended[0]:.3f} and {ended[1]:.3f}",
    ]
    if "order_agreement" in figures:
        shown.append(
            f"order                    both give the same verdict for "
            f"{figures['order_agreement']:.3f}; the answer shown first wins "
            f"{figures['first_shown_wins']:.3f}"
        )
    return shown


def write_answers(
    output_dir: str, prompts: Sequence[Example], answers: Sequence[Sequence[GivenAnswer]]
) -> None:
    """Write each side's answers as a file that can be a candidate again."""
    for number, side in enumerate(answers, 1):
        rows = (
            {"prompt": _plain(e.prompt), "response": a.text, "ended": a.ended}
            for e, a in zip(prompts, side, strict=True)
        )
        _write(output_dir, f"answers-{number}.jsonl", "\n".join(map(json.dumps, rows)))


def write_report(
    settings: WinRateSettings,
    figures: dict[str, Any],
    prompts: Sequence[Example],
    answers: tuple[list[GivenAnswer], list[GivenAnswer]],
    verdicts: Verdicts,
) -> None:
    """Write winrate.json: figures, settings, and a row for each prompt."""
    rows = [
        {
            "prompt": _plain(e.prompt),
            "answers": [side[number].text for side in answers],
            "ended": [side[number].ended for side in answers],
            "tokens": [int(side[number]) for side in verdicts.tokens],
            "margin": verdicts.margin[number].item(),
            "win": half_ties(verdicts.margin[number]).item(),
        }
        for number, e in enumerate(prompts)
    ]
    report = {"figures": figures, "settings": flag_values(settings), "rows": rows}
    text = json.dumps(report, indent=1, ensure_ascii=False)
    _write(settings.output_dir or ".", "winrate.json", text)


def _write(folder: str, name: str, text: str) -> None:
    with disk_errors_named(f"output_dir {folder}", lambda: "give another folder", name):
        Path(folder, name).write_text(text + "\n", encoding="utf-8")


def _plain(prompt: Prompt) -> Any:
    """A prompt as a row of data has it."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": turn.role, "content": turn.text} for turn in prompt]


if __name__ == "__main__":
    run_cli(main)
