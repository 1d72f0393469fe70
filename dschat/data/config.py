"""Settings of the data: where rows come from, how they are read, split, kept and batched.

Splits of a source's rows, among the three phases and into train and test, are drawn here too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from dschat.data.batching import BatchSampler, PackedBatches, RowBatches, TokenBudgetBatches
from dschat.data.registry import ReadOptions
from dschat.errors import UserError
from dschat.settings import Settings, group, setting
from dschat.text.formats import PROMPT_FORMATS

# Which answers of a conversation are targets.
TRAIN_ON = ("all_turns", "last_turn")
# Below four tokens a truncated row could hold no prompt or no answer beside its end token.
SHORTEST = 4
PHASES = (1, 2, 3)

# Distinct streams of the one seed, so that a held-out test set and a split are independent draws.
_SPLIT_STREAM, _HOLDOUT_STREAM = 1, 2


@dataclass(frozen=True)
class DataConfig(Settings):
    """Data of any step; `SFTDataConfig` sets the last two fields, which step 1 alone has."""

    data_path: tuple[str, ...] = setting(
        ("Dahoas/rm-static",), "files, folders or hub ids of preference data", may_be_empty=True
    )
    data_split: str = setting("2,4,4", "proportions of the training data for steps 1, 2 and 3")
    data_output_path: str = setting("/tmp/data_files/", "cache of tokenised data", may_change=True)
    read: ReadOptions = group(ReadOptions)
    prompt_format: str | None = setting(
        None,
        "dschat: Human: and Assistant:; chat: the chat template (default: the model's own, else "
        "chat where the tokenizer has a template)",
        choices=PROMPT_FORMATS,
    )
    preprocessing_num_workers: int | None = setting(
        None,
        "processes that tokenise, on each node (default: by cores, 1 for small sets)",
        at_least=1,
        may_change=True,
    )
    streaming: bool = setting(
        False,
        "tokenise rows as they are read and keep nothing on disk; needs --max_steps",
    )
    max_train_samples: int | None = setting(None, "use at most so many training rows", at_least=1)
    max_eval_samples: int | None = setting(None, "use at most so many evaluation rows", at_least=1)
    sft_only_data_path: tuple[str, ...] = dataclasses.field(default=(), init=False)
    train_on: str | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_proportions(self.data_split)
        if not self.data_path and not self.sft_only_data_path:
            raise UserError("data_path is empty: name at least one source")

    def sources(self, phase: int) -> list[tuple[str, str]]:
        """List the sources of a phase, each with the proportions of its split."""
        only = self.sft_only_data_path if phase == 1 else ()
        return [(name, self.data_split) for name in self.data_path] + [(n, "1") for n in only]


@dataclass(frozen=True)
class SFTDataConfig(DataConfig):
    """Data of step 1."""

    sft_only_data_path: tuple[str, ...] = setting(
        (), "data used in this step alone (prompt and response)", may_be_empty=True
    )
    train_on: str | None = setting(
        None,
        "which answers of a conversation train (default: all_turns where rows are conversations, "
        "last_turn where they are prompt and answer)",
        choices=TRAIN_ON,
    )


@dataclass(frozen=True)
class BatchConfig(Settings):
    """Batch sizes and length limit of steps 1 and 2."""

    per_device_train_batch_size: int = setting(16, "rows per device and micro-batch", at_least=1)
    per_device_eval_batch_size: int = setting(16, "rows per device in evaluation", at_least=1)
    max_seq_len: int = setting(512, "tokens of prompt and answer together", at_least=SHORTEST)
    max_tokens_per_batch: int | None = setting(
        None,
        "training batches of as many rows as fit, padded, in so many tokens per device, in place "
        "of --per_device_train_batch_size",
        at_least=1,
    )

    @property
    def own_batching(self) -> str | None:
        """The setting that asks for batches other than by rows."""
        return None if self.max_tokens_per_batch is None else "max_tokens_per_batch"

    def sampler(self, sequences: int = 1, packing: bool = False) -> BatchSampler:
        """Choose how training rows become batches; `sequences` is how many a row becomes.

        Raises:
            UserError: too few tokens for the longest row, or two ways at once.
        """
        limit, longest = self.max_tokens_per_batch, sequences * self.max_seq_len
        if limit is not None and limit < longest:
            of_what = "a pair" if sequences == 2 else "a row"
            raise UserError(
                f"max_tokens_per_batch is {limit}: {of_what} may have {longest} tokens; give at "
                "least that, or a smaller max_seq_len"
            )
        if packing and limit is not None:
            raise UserError(
                "packing and max_tokens_per_batch: packed rows are all of max_seq_len already; "
                "drop one, per_device_train_batch_size counts packed rows"
            )
        if packing:
            return PackedBatches(self.per_device_train_batch_size, self.max_seq_len)
        if limit is not None:
            return TokenBudgetBatches(limit, sequences)
        return RowBatches(self.per_device_train_batch_size)


def parse_proportions(text: str) -> tuple[float, ...]:
    """Read `data_split`: "2,4,4" (one number a phase) or "10" (every row in every phase).

    Raises:
        UserError: another count, not a number, negative, or all zero.
    """
    remedy = 'give three numbers such as "2,4,4", or one for all rows in every phase'
    try:
        proportions = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"data_split {text!r} holds what is not a number: {remedy}") from error
    if len(proportions) not in (1, len(PHASES)):
        raise UserError(f"data_split {text!r} has {len(proportions)} numbers: {remedy}")
    if not all(math.isfinite(value) and value >= 0 for value in proportions):
        raise UserError(f"data_split {text!r} has a negative or infinite number: {remedy}")
    if not any(proportions):
        raise UserError(f"data_split {text!r} is all zero: {remedy}")
    return proportions


def phase_split(size: int, seed: int, proportions: Sequence[float], phase: int) -> np.ndarray:
    """Rows of `phase` (1, 2 or 3) among `size`, as int64 indices in a seeded order.

    Phases do not overlap and together hold every row; each size is within one row of its
    proportion (cumulative rounding). A single proportion gives all rows to every phase.
    """
    if phase not in PHASES:
        raise ValueError(f"phase {phase} is none of {PHASES}")
    order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(size)
    if len(proportions) == 1:
        return order
    totals = [0.0, *accumulate(proportions)]
    start, end = (
        math.floor(size * totals[bound] / totals[-1] + 0.5) for bound in (phase - 1, phase)
    )
    return order[start:end]


def holdout_split(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Train and test rows of a source without a test set: a tenth, at least one row, is test."""
    order = np.random.default_rng([seed, _HOLDOUT_STREAM]).permutation(size)
    cut = size - max(1, size // 10)
    return order[:cut], order[cut:]
