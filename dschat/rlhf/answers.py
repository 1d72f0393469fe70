"""Sampled answers with their rewards: some for the screen, and JSON lines for later."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.functional.returns import kl_k1
from dschat.report.records import ANSWERS
from dschat.rlhf.experience import Experience, filled
from dschat.rlhf.rewards import texts_of
from dschat.train.checkpoint_folder import disk_errors
from dschat.train.line_files import keep_longest, restore_lines, set_aside
from dschat.train.metrics import format_value
from dschat.utils.files import regular, write_anew

LINES = 4  # of one text on the screen, about
INDENT = " " * len("answer  ")
FIGURES = {"reward": "reward", "model": "reward_model", "function": "reward_function", "KL": "kl"}


@dataclass(frozen=True)
class Answer:
    """One sampled answer and its rewards; parts that a run does not have are None.

    Attributes:
        reward: None where nothing gave a score.
        rewards: value of each function by its name, where there are several.
    """

    iteration: int
    prompt: str
    answer: str
    reward: float | None
    reward_model: float | None
    reward_function: float | None
    kl: float  # nats over the entire answer, k1
    length: int  # tokens
    ended: bool
    rewards: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        e: Experience,
        row: int,
        tokenizer: PreTrainedTokenizerBase,
        iteration: int,
        functions: Sequence[str] = (),
    ) -> Answer:
        """Make the record of a row of a rollout; `functions` names the reward functions."""
        prompt, answer = texts_of(e, row, tokenizer)
        mask = e.answer_mask[row]
        values = _values(e, row)
        is_one = len(values) == 1
        return cls(
            iteration=iteration,
            prompt=prompt,
            answer=answer,
            reward=filled(e.rewards)[row].item() if e.counted[row] else None,
            reward_model=None if e.model_scores is None else e.model_scores[row].item(),
            reward_function=values[0] if is_one else None,
            kl=kl_k1(e.logprobs[row], e.ref_logprobs[row])[mask].sum().item(),
            length=int(mask.sum()),
            ended=bool(e.ended[row]),
            rewards={} if is_one else dict(zip(functions, values, strict=True)),
        )


def _values(e: Experience, row: int) -> list[float | None]:
    """Scores of one row by each function."""
    if e.function_scores is None:
        return []
    scores, given = e.function_scores[row].tolist(), filled(e.function_scored)[row].tolist()
    return [score if is_given else None for score, is_given in zip(scores, given, strict=True)]


def choose_answers(
    experiences: Sequence[Experience],
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    iteration: int,
    functions: Sequence[str] = (),
) -> list[Answer]:
    """Choose at most `count` real rows, spread over all rollouts."""
    real = [(e, row) for e in experiences for row in range(len(e)) if e.real[row]]
    shown = min(count, len(real))
    picked = [real[number * len(real) // shown] for number in range(shown)]
    return [Answer.of(e, row, tokenizer, iteration, functions) for e, row in picked]


def format_answers(answers: Sequence[Answer], width: int | None = None) -> str:
    """Format the end of each prompt, the beginning of its answer, and its figures.

    Texts are escaped as Python's are; `width` is in columns, by default the terminal's.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    limit = LINES * (width - len(INDENT))
    blocks = []
    for a in answers:
        figures = {title: getattr(a, name) for title, name in FIGURES.items()} | a.rewards
        shown = [f"{name} {format_value(x)}" for name, x in figures.items() if x is not None]
        shown += [f"{a.length} tokens", "ended" if a.ended else "not ended"]
        texts = {"prompt": repr(a.prompt)[-limit:], "answer": repr(a.answer)[:limit]}
        for label, text in {**texts, "": " | ".join(shown)}.items():
            first = label.ljust(len(INDENT))
            blocks.append(
                textwrap.fill(text, width, initial_indent=first, subsequent_indent=INDENT)
            )
    return "\n".join(blocks)


class AnswerFile:
    """A file of answers, one a line, such as `OUTPUT/answers.jsonl`: every answer that was shown.

    An earlier run's file gets a number; a resumed run continues its own, up to the iteration that
    it resumes at.

    Args:
        saved: the checkpoint's copy, if it has one; a file that does not begin with it is another
            run's, or damaged.

    Raises:
        UserError: there is no copy, and a line is damaged.
    """

    def __init__(
        self,
        output_dir: str | Path,
        resumed_at: int | None,
        name: str = ANSWERS,
        saved: Path | None = None,
    ):
        self.path = Path(output_dir) / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resumed_at is None:
            set_aside(self.path)
        elif resumed_at == 0:  # at the beginning, without a checkpoint
            keep_longest(self.path)
        elif saved is not None and saved.is_file():
            # Those of the last iteration may have been written again, by another evaluation.
            begin = b"".join(_lines_until(saved, resumed_at - 1))
            restore_lines(self.path, saved, begin)
        elif self.path.exists():  # of a checkpoint by an earlier version, or before the first line
            self._replace(_lines_until(self.path, resumed_at))

    def _replace(self, lines: Sequence[bytes]) -> None:
        part = self.path.with_suffix(".tmp")
        write_anew(part, b"".join(lines))
        part.replace(self.path)

    def replace(self, iteration: int, answers: Sequence[Answer]) -> None:
        """Replace the answers of the last iteration, or add them where it has none."""
        with disk_errors(self.path.parent, self.path):
            earlier = _lines_until(self.path, iteration - 1) if self.path.exists() else []
            self._replace([*earlier, *(line.encode() for line in _lines(answers))])

    def write(self, answers: Sequence[Answer]) -> None:
        """Add lines, in one write."""
        errors = disk_errors(self.path.parent, self.path)
        with errors, self.path.open("a", encoding="utf-8") as file:
            file.write("".join(_lines(answers)))


def _lines(answers: Sequence[Answer]) -> Iterator[str]:
    return (json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers)


def _lines_until(path: Path, iteration: int) -> list[bytes]:
    # Bytes: texts may hold characters that end a line elsewhere, a kill may leave half a one.
    with regular(path).open("rb") as file:
        lines = [line for line in file if line.endswith(b"\n")]
    try:
        return [line for line in lines if json.loads(line)["iteration"] <= iteration]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: a line is damaged; remove the file, and start again") from error
