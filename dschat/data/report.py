"""Reports on tokenised sets: what became of the rows of each source."""

from collections.abc import Sequence
from dataclasses import dataclass, field

PHASE_NAMES = {1: "supervised fine-tuning", 2: "preference pairs", 3: "PPO prompts"}


@dataclass(frozen=True)
class SourceReport:
    """Row counts of one source: rows = used + identical_pairs + empty_answers.

    Pairs are dropped when equal (from the start or once truncated), empty answers in phase 1 alone;
    truncations of dropped pairs are counted too. `turns_cut` are earlier answers that lost their
    beginning and so do not train. `skipped` rows, by reason, were of no use to any phase and are
    not among `rows`; those of a source without a test set all stand with its train rows.
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
    skipped: dict[str, int] = field(default_factory=dict)

    def line(self) -> str:
        """Report in one line."""
        line = (
            f"{self.name} {self.split}: {self.used} of {self.rows} rows used, "
            f"{self.prompts_cut} prompts and {self.answers_cut} answers cut, dropped "
            f"{self.identical_pairs} identical pairs and {self.empty_answers} empty answers"
        )
        if self.turns_cut:
            line += f"; {self.turns_cut} earlier answers lost their beginning and do not train"
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
        return f"{line}; of no use: {reasons}" if reasons else line


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
