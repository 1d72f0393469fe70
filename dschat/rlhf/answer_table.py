"""Sampled answers with their rewards: a table for the screen, JSON lines for later."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dschat.functional.returns import kl_k1
from dschat.rlhf.experience import Experience, filled
from dschat.rlhf.rewards import texts_of
from dschat.train.metrics import format_value, set_aside

FILE = "answers.jsonl"
LINES = 4  # of one cell
PROMPT_SHARE = 0.35  # of the room for texts
FIGURES = {"reward": "reward", "model": "reward_model", "function": "reward_function", "KL": "kl"}
NARROWEST = 12  # of a text's column, whatever the terminal


@dataclass(frozen=True)
class Answer:
    """One sampled answer and its rewards; parts that a run does not have are None."""

    iteration: int
    prompt: str
    answer: str
    reward: float
    reward_model: float | None
    reward_function: float | None
    kl: float  # nats over the entire answer, k1
    length: int  # tokens
    ended: bool

    @classmethod
    def of(
        cls, e: Experience, row: int, tokenizer: PreTrainedTokenizerBase, iteration: int
    ) -> Answer:
        """Take a row of a rollout."""
        prompt, answer = texts_of(e, row, tokenizer)
        mask = e.answer_mask[row]
        parts = [None if p is None else p[row].item() for p in (e.model_scores, e.function_scores)]
        return cls(
            iteration=iteration,
            prompt=prompt,
            answer=answer,
            reward=filled(e.rewards)[row].item(),
            reward_model=parts[0],
            reward_function=parts[1],
            kl=kl_k1(e.logprobs[row], e.ref_logprobs[row])[mask].sum().item(),
            length=int(mask.sum()),
            ended=bool(e.ended[row]),
        )


def choose_answers(
    experiences: Sequence[Experience],
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    iteration: int,
) -> list[Answer]:
    """Choose at most `count` real rows, spread over all rollouts."""
    real = [(e, row) for e in experiences for row in range(len(e)) if e.real[row]]
    shown = min(count, len(real))
    picked = [real[number * len(real) // shown] for number in range(shown)]
    return [Answer.of(e, row, tokenizer, iteration) for e, row in picked]


def answer_table(answers: Sequence[Answer], width: int | None = None) -> str:
    """Format answers as a table of `width` columns (default: the terminal's).

    Prompts show their end, answers their beginning, in at most `LINES` lines each.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    numbers = {}
    for title, name in FIGURES.items():
        figures = [getattr(a, name) for a in answers]
        if None not in figures:
            numbers[title] = [format_value(figure) for figure in figures]
    numbers["tokens"] = [str(a.length) for a in answers]
    numbers["ended"] = ["yes" if a.ended else "no" for a in answers]
    widths = [max(map(len, (title, *cells))) for title, cells in numbers.items()]
    room = max(width - sum(widths) - 2 * len(widths) - 2, 2 * NARROWEST)
    left = max(int(PROMPT_SHARE * room), NARROWEST)
    right = room - left

    def line(prompt: str, answer: str, cells: Sequence[str] = ()) -> str:
        aligned = (cell.rjust(w) for cell, w in zip(cells, widths, strict=False))
        return "  ".join([prompt.ljust(left), answer.ljust(right), *aligned]).rstrip()

    lines = [line("prompt", "answer", list(numbers))]
    lines.append("-" * len(lines[0]))
    for row, answer in enumerate(answers):
        texts = (_wrapped(answer.prompt, left, -1), _wrapped(answer.answer, right, 1))
        first: Sequence[str] = [cells[row] for cells in numbers.values()]
        for prompt, text in itertools.zip_longest(*texts, fillvalue=""):
            lines.append(line(prompt, text, first))
            first = ()
    return "\n".join(lines)


def _wrapped(text: str, width: int, end: int) -> list[str]:
    """Break a text into at most `LINES` lines, at any character.

    Line breaks become ↵, other control characters are escaped.

    Args:
        end: of a longer text 1 keeps the beginning, -1 the end, with a … instead of the rest.
    """
    characters = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    shown = "".join("↵" if c == "\\n" else c for c in characters)
    limit = LINES * width
    if len(shown) > limit:
        shown = shown[: limit - 1] + "…" if end > 0 else "…" + shown[1 - limit :]
    return [shown[i : i + width] for i in range(0, len(shown), width)] or [""]


class AnswerFile:
    """`OUTPUT/answers.jsonl`: every answer that was shown, one a line.

    An earlier run's file gets a number; a resumed run continues its own, up to the iteration that
    it resumes at.
    """

    def __init__(self, output_dir: str | Path, resumed_at: int | None):
        self.path = Path(output_dir) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resumed_at is None:
            set_aside(self.path)
        elif self.path.exists():
            self._truncate(resumed_at)

    def _truncate(self, resumed_at: int) -> None:
        # Bytes: texts may hold characters that end a line elsewhere, a kill may leave half a one.
        with self.path.open("rb") as file:
            lines = [
                line
                for line in file
                if line.endswith(b"\n") and json.loads(line)["iteration"] <= resumed_at
            ]
        part = self.path.with_suffix(".tmp")
        part.write_bytes(b"".join(lines))
        part.replace(self.path)

    def write(self, answers: Sequence[Answer]) -> None:
        """Add lines, in one write."""
        lines = (json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
