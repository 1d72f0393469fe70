"""Reports on tokenised sets: what became of the rows of each source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PHASE_NAMES = {1: "supervised fine-tuning", 2: "preference pairs", 3: "PPO prompts"}


@dataclass(frozen=True)
class SourceReport:
    """Row counts of one source and split: rows = used + identical_pairs + empty_answers.

    Pairs are dropped when equal (from the start or once truncated), empty answers in phase 1 alone;
    truncations of dropped pairs are counted too. `turns_cut` are earlier answers that lost their
    beginning and so do not train. `special_names` are rows whose text names special tokens,
    `questions` and `transcripts` prompts that are text and not turns, `margins` pairs with one,
    `one_sided` pairs with an answer that says nothing.
    `skipped` rows, by reason, are unusable in any phase and are not among `rows`; those of a
    source without a test set all stand with its train rows. `left` are rows of the source that
    others get.
    """

    name: str
    split: str
    rows: int
    used: int
    prompts_cut: int = 0
    answers_cut: int = 0
    identical_pairs: int = 0
    empty_answers: int = 0
    turns_cut: int = 0
    special_names: int = 0
    questions: int = 0
    transcripts: int = 0
    margins: int = 0
    one_sided: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    def line(self) -> str:
        """Report in one line: `54 of 300 rows (30 held out, 216 for other steps)`."""
        gone = {
            **self.left,
            "identical pairs dropped": self.identical_pairs,
            "empty answers dropped": self.empty_answers,
            **{f"unusable: {reason}": count for reason, count in self.skipped.items()},
        }
        total = self.rows + sum(self.left.values()) + sum(self.skipped.values())
        line = f"{self.name} {self.split}: {self.used} of {total} rows"
        if reasons := _listed(gone):
            line += f" ({reasons})"
        notes = {
            "prompts cut": self.prompts_cut,
            "answers cut": self.answers_cut,
            "earlier answers lost their beginning and do not train": self.turns_cut,
            "pairs with an empty answer": self.one_sided,
        }
        return f"{line}; {cuts}" if (cuts := _listed(notes)) else line


def reading_notes(name: str, splits: Sequence[SourceReport]) -> list[str]:
    """Describe how the texts of a source are read, where it may be otherwise than meant."""
    questions, transcripts, named, margins = (
        sum(getattr(split, count) for split in splits)
        for count in ("questions", "transcripts", "special_names", "margins")
    )
    lines = []
    if questions:
        which = f"{questions} of {questions + transcripts} prompts" if transcripts else "prompts"
        lines.append(
            f"{which} are plain text, each one question (prompt_format raw leaves text as it is)"
        )
    if margins:
        lines.append(f"pairs with a margin: {margins}; a reward model's loss asks for it")
    lines += named_note(named)
    return [f"{name}: {line}" for line in lines]


def named_note(rows: int) -> list[str]:
    """Say of so many rows that they name special tokens; nothing of none."""
    if not rows:
        return []
    return [
        f"rows that name special tokens: {rows}; there the names are ordinary text "
        "(keep_special_tokens makes them the tokens)"
    ]


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


@dataclass(frozen=True)
class DataReport:
    """Row counts by source, and of the sets in the end."""

    phase: int
    sources: tuple[SourceReport, ...]
    train_rows: int | None  # None: not counted, they are streamed
    eval_rows: int

    def lines(self) -> list[str]:
        """List one readable line a source and split, and one for the sets in use."""
        lines = [source.line() for source in self.sources]
        for own in dict.fromkeys(source.name for source in self.sources):
            lines += reading_notes(own, [source for source in self.sources if source.name == own])
        name = PHASE_NAMES[self.phase]
        train = "rows streamed" if self.train_rows is None else f"{self.train_rows} rows"
        return [*lines, f"{name}: {train} to train on, {self.eval_rows} to evaluate"]


def nothing_left(reports: Sequence[SourceReport], split: str, data_split: str, phase: int) -> str:
    """Explain a train or eval set without a row: too small a share, or all dropped."""
    mine = [report for report in reports if report.split == split]
    names = ", ".join(report.name for report in mine) or "any source"
    name = PHASE_NAMES[phase]
    if not any(report.rows for report in mine):
        return (
            f"phase {phase} ({name}) gets no rows of {names} under data_split {data_split!r}: "
            f"give phase {phase} a larger share"
        )
    identical = sum(report.identical_pairs for report in mine)
    empty = sum(report.empty_answers for report in mine)
    return (
        f"phase {phase} ({name}) has no {split} rows of {names} left: dropped {identical} "
        f"identical pairs and {empty} empty answers; check the answers or raise max_seq_len"
    )
