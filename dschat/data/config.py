"""Settings of the data: where rows come from, how they are read, split and kept."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from dschat.data.user_reader import ReadOptions
from dschat.errors import UserError
from dschat.settings import Settings, group, setting
from dschat.text.formats import PROMPT_FORMATS

# Which answers of a conversation are targets.
TRAIN_ON = ("all_turns", "last_turn")
# Below four tokens a truncated row could hold no prompt or no answer beside its end token.
SHORTEST = 4
PHASES = (1, 2, 3)  # answers, pairs, prompts


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
