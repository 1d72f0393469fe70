"""Settings of the data: where rows come from, how they are read, split, kept and batched."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dschat.data.proportions import parse_proportions
from dschat.data.user_reader import ReadOptions
from dschat.errors import UserError
from dschat.settings import Settings, group, setting
from dschat.text.formats import PROMPT_FORMATS

if TYPE_CHECKING:
    from dschat.data.batching import BatchSampler

# Which answers of a conversation are targets.
TRAIN_ON = ("all_turns", "last_turn")
# Below four tokens a truncated row could hold no prompt or no answer beside its end token.
SHORTEST = 4


@dataclass(frozen=True)
class DataConfig(Settings):
    """Data of any step; `SFTDataConfig` sets the last two fields, which step 1 alone has."""

    data_path: tuple[str, ...] = setting(
        ("Dahoas/rm-static",), "files, folders or hub ids of preference data", may_be_empty=True
    )
    data_split: str | None = setting(
        None,
        "proportions of the training rows for steps 1, 2 and 3, as in 2,4,4 (default: all rows to "
        "every step; 2,4,4 for the sets that DeepSpeed-Chat names)",
    )
    data_output_path: str | None = setting(
        None,
        "cache of tokenised data (default: dschat in the user's own cache folder)",
        may_change=True,
    )
    read: ReadOptions = group(ReadOptions)
    prompt_format: str | None = setting(
        None,
        "dschat: Human: and Assistant:; chat: the chat template; raw: texts as they stand "
        "(default: the model's own, else chat where the tokenizer has a template, else dschat)",
        choices=PROMPT_FORMATS,
    )
    keep_special_tokens: bool = setting(
        False, "names of special tokens in a row's text, such as </s>, become the tokens"
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
        if self.data_split is not None:
            parse_proportions(self.data_split)
        if not self.data_path and not self.sft_only_data_path:
            raise UserError("data_path is empty: name at least one source")


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
