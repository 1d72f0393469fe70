"""Pictures of tokenised sets: lengths, padding, and rows with the trained tokens marked."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from dschat.data.batching import BatchSampler, RowBatches
from dschat.data.token_batches import PackedBatches, TokenBudgetBatches
from dschat.utils.printable import printable

_BINS, _BAR = 12, 40
_GREEN, _PLAIN = "\033[1;32m", "\033[0m"
# The token columns of each phase, and their labels.
_SEQUENCES = {
    1: {"input_ids": "row"},
    2: {"chosen_ids": "chosen", "rejected_ids": "rejected"},
    3: {"prompt_ids": "prompt"},
}


@dataclass(frozen=True)
class Marks:
    """Text put before and after trained text."""

    start: str
    stop: str

    @classmethod
    def of(cls, in_colour: bool) -> "Marks":
        """Choose green letters, or brackets."""
        return cls(_GREEN, _PLAIN) if in_colour else cls("[[", "]]")


def sequence_lengths(rows: datasets.Dataset, phase: int) -> np.ndarray:
    """Count tokens, (sequences a row, rows); two sequences in phase 2, else one."""
    columns = list(_SEQUENCES[phase])
    lengths = [
        [len(ids) for batch in rows.select_columns(name).iter(1000) for ids in batch[name]]
        for name in columns
    ]
    return np.array(lengths)


def histogram(lengths: np.ndarray) -> list[str]:
    """Draw the lengths of all sequences: figures in a line, then a bar for each range."""
    flat = lengths.ravel()
    middle, high = np.percentile(flat, [50, 95])
    lines = [
        f"tokens a sequence: {flat.min()} to {flat.max()}, mean {flat.mean():.1f}, "
        f"median {middle:.0f}, 95 % have at most {high:.0f}"
    ]
    edges = np.unique(np.linspace(flat.min(), flat.max() + 1, _BINS + 1).round().astype(int))
    counts, _ = np.histogram(flat, edges)
    for (start, stop), count in zip(pairwise(edges), counts, strict=True):
        bar = "#" * round(_BAR * count / counts.max())
        lines.append(f"{start:>6} to {stop - 1:<6} {count:>8}  {bar}".rstrip())
    return lines


def real_share(lengths: np.ndarray, sampler: BatchSampler, seed: int = 0) -> float:
    """Compute the share of a first epoch's slots that hold real tokens, on one rank.

    Args:
        lengths: (sequences a row, rows), as `sequence_lengths` gives them.
    """
    longest = lengths.max(axis=0)
    epoch = sampler.epoch(longest, 1, np.random.default_rng([seed, 0]))
    slots = 0
    for items in epoch.batches():
        if isinstance(sampler, PackedBatches):
            widths = [int(longest[item].sum()) for item in items]
        else:
            widths = [int(longest[row]) for item in items for row in item]
        slots += len(widths) * max(widths) * len(lengths)
    return float(lengths.sum()) / slots


def padding_lines(
    lengths: np.ndarray, phase: int, batch_size: int, max_tokens: int, max_len: int
) -> list[str]:
    """List the share of real tokens under each way of making batches."""
    sequences = len(lengths)
    ways: dict[str, BatchSampler] = {
        f"{batch_size} rows, like lengths together": RowBatches(batch_size)
    }
    if phase != 3 and max_tokens >= sequences * max_len:
        ways[f"--max_tokens_per_batch {max_tokens}"] = TokenBudgetBatches(max_tokens, sequences)
    if phase == 1:
        ways[f"--packing, {batch_size} rows of up to {max_len}"] = PackedBatches(
            batch_size, max_len
        )
    shares = {f"every row padded to {max_len}": lengths.sum() / (lengths.size * max_len)}
    shares |= {name: real_share(lengths, sampler) for name, sampler in ways.items()}
    width = max(map(len, shares))
    return [f"{name:<{width}}  {share:6.1%} real tokens" for name, share in shares.items()]


def render(
    row: dict, phase: int, tokenizer: PreTrainedTokenizerBase, marks: Marks
) -> list[tuple[str, str]]:
    """Label and decode each sequence of a row, trained tokens between marks.

    In phase 2 they are those of the answer, which the score is of; in phase 3 none.
    """
    shown = []
    for column, label in _SEQUENCES[phase].items():
        ids = row[column]
        spans = {1: row.get("trained", []), 2: [row.get("prompt_len", 0), len(ids)], 3: []}[phase]
        shown.append((f"{label}, {len(ids)} tokens", _marked(ids, spans, tokenizer, marks)))
    return shown


def _marked(
    ids: list[int], spans: Sequence[int], tokenizer: PreTrainedTokenizerBase, marks: Marks
) -> str:
    """Take pieces out of the text of everything before them: alone, some lose a space."""
    bounds = [0, *spans, len(ids)]
    texts = [str(tokenizer.decode(ids[:bound])) for bound in bounds]
    pieces = []
    for number, (before, text) in enumerate(pairwise(texts)):
        piece = printable(text[len(before) :])
        is_trained = number % 2 == 1
        pieces.append(f"{marks.start}{piece}{marks.stop}" if is_trained and piece else piece)
    return "".join(pieces)
