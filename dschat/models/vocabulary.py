"""Rows of embedding and head: enough for the tokenizer, and new ones for its added tokens."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from dschat.errors import UserError
from dschat.utils import zero
from dschat.utils.distributed import print_rank_0
from dschat.utils.module.untrained_rows import FIRST_NEW_ROW

VOCABULARY_MULTIPLE = 8  # matrix units like embeddings in multiples of 8 rows
NEW_ROWS_SEED, NEW_ROWS_SPREAD = 0, 0.6
MOST_NEW_ROWS = 0.2  # share of its tokens without a row, up to which a tokenizer is the model's own


def check_vocabulary(name: str, rows: int, tokens: int) -> None:
    """Refuse a tokenizer of another model: many of its tokens have no row.

    Fewer tokens than rows are usual, since tables are padded, and so are a few added tokens.

    Args:
        rows: of the model's embedding. tokens: of the tokenizer.

    Raises:
        UserError: more than `MOST_NEW_ROWS` of the tokens would have an untrained row.
    """
    new = tokens - rows
    if new > MOST_NEW_ROWS * tokens:
        raise UserError(
            f"model {name}: {new:,} of the tokenizer's {tokens:,} tokens have no row in its "
            f"embedding of {rows:,}; give the model's own tokenizer, or resize the embedding and "
            "train it before"
        )


def grow_vocabulary(model: PreTrainedModel, size: int) -> None:
    """Add embedding rows when the tokenizer is larger; never remove any; say so.

    They are random (`_draw_new_rows`), and the same whenever they are added to the same model: a
    policy and the frozen copy of it start alike.

    Raises:
        UserError: as `check_vocabulary` does.
    """
    rows = zero.full_shape(model.get_input_embeddings().get_parameter("weight"))[0]
    if size <= rows:
        return
    name = model.name_or_path or type(model).__name__
    check_vocabulary(name, rows, size)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(NEW_ROWS_SEED)
        model.resize_token_embeddings(
            size, pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False
        )
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        for weight in dict.fromkeys(t.get_parameter("weight") for t in tables if t is not None):
            _draw_new_rows(weight, rows)
    vars(model.get_input_embeddings())[FIRST_NEW_ROW] = rows
    grown = model.config.get_text_config().vocab_size
    print_rank_0(
        f"model {name}: its embedding grows from {rows:,} to {grown:,} rows for the tokenizer's "
        f"{size:,} tokens; new rows start random"
    )


@torch.no_grad()
def _draw_new_rows(table: torch.Tensor, rows: int) -> None:
    """Draw the rows of a table (V, H) from `rows` on, around the mean of those before.

    At the mean they are hardly ever likely; `NEW_ROWS_SPREAD` of the others' spread keeps them
    apart, without which no adapter can learn to write one of them
    (docs/reward_models.md has the figures).
    """
    with zero.gathered([table], modifier_rank=0):
        old = table[:rows].float()
        noise = torch.randn(table.shape[0] - rows, table.shape[1], dtype=torch.float32)
        drawn = old.mean(dim=0) + NEW_ROWS_SPREAD * old.std(dim=0) * noise.to(old.device)
        table[rows:] = drawn.to(table.dtype)
