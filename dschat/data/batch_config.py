"""Settings of batches: how many rows or tokens make one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dschat.data.config import SHORTEST
from dschat.errors import UserError
from dschat.settings import Settings, setting

if TYPE_CHECKING:
    from dschat.data.batching import BatchSampler


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

    def check_sampler(self, sequences: int = 1, packing: bool = False) -> None:
        """Check what `sampler` is asked for.

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

    def sampler(self, sequences: int = 1, packing: bool = False) -> BatchSampler:
        """Choose how training rows become batches; `sequences` is how many a row becomes.

        Raises:
            UserError: as `check_sampler`.
        """
        from dschat.data.batching import RowBatches
        from dschat.data.token_batches import PackedBatches, TokenBudgetBatches

        self.check_sampler(sequences, packing)
        if packing:
            return PackedBatches(self.per_device_train_batch_size, self.max_seq_len)
        if self.max_tokens_per_batch is not None:
            return TokenBudgetBatches(self.max_tokens_per_batch, sequences)
        return RowBatches(self.per_device_train_batch_size)
