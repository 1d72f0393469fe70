"""Sampled answers with their rewards: a table for the screen, JSON lines for later."""

from __future__ import annotations

import json
import shutil
import unicodedata
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
NARROWEST = 12  # of a text's column, whatever the terminal


@dataclass(frozen=True)
class Answer:
    """One sampled answer and what it earned; parts that a run does not have are None."""

    iteration: int
    prompt: str
    answer: str
    reward: float
    reward_model: float | None
    reward_function: float | None
    kl: float  # nats over the whole answer, k1
    length: int  # tokens
    ended: bool

    @classmethod
    def of(
        cls, e: Experience, row: int, tokenizer: PreTrainedTokenizerBase, iteration: int
    ) -> Answer:
        """A row of a rollout."""
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
    """At most `count` rows, spread over all rollouts; rows that only fill a batch are none."""
    real = [(e, row) for e in experiences for row in range(len(e)) if e.real[row]]
    shown = min(count, len(real))
    picked = [real[number * len(real) // shown] for number in range(shown)]
    return [Answer.of(e, row, tokenizer, iteration) for e, row in picked]


def answer_table(answers: Sequence[Answer], width: int | None = None) -> str:
    """The answers as a table of `width` columns (default: the terminal's).

    Of a prompt the end is shown, of an answer the beginning, in at most `LINES` lines each.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    numbers = {"reward": [format_value(a.reward) for a in answers]}
    for title, name in (("model", "reward_model"), ("function", "reward_function")):
        values = [getattr(a, name) for a in answers]
        if None not in values:
            numbers[title] = [format_value(value) for value in values]
    numbers["KL"] = [format_value(a.kl) for a in answers]
    numbers["tokens"] = [str(a.length) for a in answers]
    numbers["ended"] = ["yes" if a.ended else "no" for a in answers]
    widths = [max(map(len, (title, *cells))) for title, cells in numbers.items()]
    room = max(width - sum(widths) - 2 * len(widths) - 2, 2 * NARROWEST)
    prompt_width = max(int(PROMPT_SHARE * room), NARROWEST)
    answer_width = room - prompt_width
    text_titles = _padded("prompt", prompt_width) + "  " + _padded("answer", answer_width)
    titles = [title.rjust(w) for title, w in zip(numbers, widths, strict=True)]
    lines = ["  ".join([text_titles, *titles]).rstrip()]
    lines.append("-" * len(lines[0]))
    for number, answer in enumerate(answers):
        prompt = _wrapped(answer.prompt, prompt_width, keep_end=True)
        text = _wrapped(answer.answer, answer_width, keep_end=False)
        cells = [c[number].rjust(w) for c, w in zip(numbers.values(), widths, strict=True)]
        for i in range(max(len(prompt), len(text))):
            left = prompt[i] if i < len(prompt) else ""
            right = text[i] if i < len(text) else ""
            row = [_padded(left, prompt_width), _padded(right, answer_width)]
            lines.append("  ".join([*row, *(cells if i == 0 else [])]).rstrip())
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Line breaks as ↵, other control characters escaped."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join("↵" if c == "\\n" else c for c in shown)


def _columns(character: str) -> int:
    """How many columns of a screen it takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _padded(text: str, width: int) -> str:
    return text + " " * (width - sum(map(_columns, text)))


def _wrapped(text: str, width: int, keep_end: bool) -> list[str]:
    """At most `LINES` lines of so many columns; of too long a text one end, and a … instead."""
    shown = _printable(text)
    # A wide character may leave the last column of a line empty.
    limit = LINES * width - (LINES - 1)
    if sum(map(_columns, shown)) > limit:
        kept, used = [], 1
        for character in reversed(shown) if keep_end else shown:
            used += _columns(character)
            if used > limit:
                break
            kept.append(character)
        shown = "…" + "".join(reversed(kept)) if keep_end else "".join(kept) + "…"
    lines, line, used = [], "", 0
    for character in shown:
        if used + _columns(character) > width:
            lines.append(line)
            line, used = "", 0
        line, used = line + character, used + _columns(character)
    return [*lines, line]


class AnswerFile:
    """`OUTPUT/answers.jsonl`: every answer that was shown, one a line.

    What an earlier run wrote is kept under a number; a resumed run goes on with its own lines up to
    the iteration that it resumes at.
    """

    def __init__(self, output_dir: str | Path, resumed_at: int | None):
        self.path = Path(output_dir) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resumed_at is None:
            set_aside(self.path)
        elif self.path.exists():
            self._cut(resumed_at)

    def _cut(self, resumed_at: int) -> None:
        # Bytes: texts may hold characters that end a line elsewhere, and a kill may cut one apart.
        with self.path.open("rb") as file:
            whole = [
                line
                for line in file
                if line.endswith(b"\n") and json.loads(line)["iteration"] <= resumed_at
            ]
        part = self.path.with_suffix(".tmp")
        part.write_bytes(b"".join(whole))
        part.replace(self.path)

    def write(self, answers: Sequence[Answer]) -> None:
        """Add lines, in one write."""
        lines = (json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
