"""The page of a comparison: a block for each prompt with every model's answer and its reward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dschat.config.answering import CompareSettings
from dschat.report.html import fill, put_in_place
from dschat.rlhf.candidates import GivenAnswer
from dschat.text.conversations import Example, as_turns

HERE = Path(__file__).parent
LETTERS = "ABC"
ROLES = {"system": "System", "user": "Prompt", "assistant": "Answer before"}


@dataclass
class Column:
    """One model's answers; `rewards` is None where no reward model scored them."""

    name: str
    answers: Sequence[GivenAnswer]
    rewards: Sequence[float] | None = None


def write_page(
    path: Path, settings: CompareSettings, prompts: Sequence[Example], columns: Sequence[Column]
) -> None:
    """Write the page; it takes its place in one step.

    Raises:
        OSError: it cannot be written.
    """
    rows = list(_rows(prompts, columns))
    context = {
        "title": " against ".join(_short(column.name) for column in columns),
        "subtitle": _subtitle(settings, len(rows)),
        "columns": [_summary(letter, c) for letter, c in zip(LETTERS, columns, strict=False)],
        "rows": rows,
        "letters": LETTERS[: len(columns)],
        "scored": columns[0].rewards is not None,
    }
    script = (HERE / "compare.js").read_text(encoding="utf-8")
    put_in_place(path, fill(HERE / "compare.html.j2", context, script).encode())


def _short(name: str) -> str:
    """The last two parts of a path, which tell folders of runs apart."""
    return "/".join(Path(name).parts[-2:]) or name


def _subtitle(settings: CompareSettings, count: int) -> str:
    sampling = settings.sampling
    drawn = "likeliest tokens" if settings.greedy else f"temperature {sampling.temperature:g}"
    parts = [
        f"{count} prompts of {settings.prompts}",
        f"{drawn}, up to {sampling.max_answer_seq_len} tokens, seed {settings.seed}",
    ]
    if settings.reward_model is not None:
        parts.append(f"rewards by {settings.reward_model}")
    return " · ".join(parts)


def _summary(letter: str, column: Column) -> dict[str, Any]:
    """A model's line of the table at the top."""
    count = len(column.answers)
    words = sum(len(answer.text.split()) for answer in column.answers) / count
    return {
        "letter": letter,
        "name": column.name,
        "reward": None if column.rewards is None else f"{sum(column.rewards) / count:.3f}",
        "words": f"{words:.1f}",
        "ended": f"{sum(answer.ended for answer in column.answers) / count:.0%}",
    }


def _rows(prompts: Sequence[Example], columns: Sequence[Column]) -> Iterator[dict[str, Any]]:
    for number, example in enumerate(prompts):
        turns = [{"who": ROLES[t.role], "text": t.text.strip()} for t in as_turns(example.prompt)]
        rewards = [c.rewards[number] for c in columns if c.rewards is not None]
        answers = [
            _answer(letter, column, number, rewards)
            for letter, column in zip(LETTERS, columns, strict=False)
        ]
        spread = max(rewards) - min(rewards) if rewards else 0.0
        yield {"number": number + 1, "turns": turns, "answers": answers, "spread": spread}


def _answer(letter: str, column: Column, number: int, rewards: Sequence[float]) -> dict[str, Any]:
    answer = column.answers[number]
    reward = None if column.rewards is None else column.rewards[number]
    # How far it is above the best of the others: the winner's is the only one above 0.
    others = [r for n, r in enumerate(rewards) if n != LETTERS.index(letter)]
    difference = None if reward is None or not others else reward - max(others)
    return {
        "letter": letter,
        "name": column.name,
        "text": answer.text.strip(),
        "ended": answer.ended,
        "words": len(answer.text.split()),
        "reward": reward,
        "difference": difference,
    }
