"""Proof that padding beside a text changes nothing about it, by the real model before training.

Some families of transformers look at no padding mask (`cpmant`), carry what they read of padding
on to the text after it (`rwkv`), or count positions from the row's beginning, padding included
(the decoders of `bart`). Their rows would train and score as their neighbours in a batch make them.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.models.causal_lm import eval_mode, unwrap
from dschat.models.packing import TOLERANCE
from dschat.models.right_padding import outputs

_TEXT, _LONGEST = 6, 16  # tokens
_IN_FRONT = 4  # of the padding on the left


@torch.no_grad()
def prove_padding(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    name: str,
    *,
    left: bool = False,
) -> None:
    """Check that a text has the same values beside padding as alone; two short passes.

    Most of its tokens must agree: one whose experts are chosen by a hair may differ by rounding.

    Args:
        model: a causal LM, a reward model, or an engine around one; on every rank.
        name: of the model, for the message.
        left: there is padding before texts too, as in step 3; else only after them.

    Raises:
        UserError: the model sees padding that is masked.
    """
    start = _IN_FRONT if left else 0
    rows = torch.arange(3, 3 + 2 * _LONGEST).view(2, _LONGEST)
    mask = torch.ones_like(rows, dtype=torch.bool)
    text = slice(start, start + _TEXT)
    mask[1] = False
    mask[1, text] = True
    pad = tokenizer.pad_token_id
    rows = rows.where(mask, 0 if pad is None else pad)
    rows, mask = rows.to(device), mask.to(device)
    with eval_mode(model):
        beside = outputs(model, rows, mask)[1, text].float()
        alone = outputs(model, rows[1:, text], mask[1:, text])[0].float()
    off = (beside - alone).abs().view(_TEXT, -1).amax(-1).median()  # of the tokens
    difference = (off / alone.abs().max().clamp(min=torch.finfo(alone.dtype).tiny)).item()
    dtype = next(unwrap(model).parameters()).dtype
    config = unwrap(model).config
    assert isinstance(config, PretrainedConfig)
    where = "in front of a text" if left else "after a text"
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"model {name}: a text gets other values beside padding than alone (by "
            f"{difference:.1%} of the largest), as {config.model_type} of transformers does not "
            f"leave padding {where} out; batches would change what is learned and scored, give a "
            "model of another family"
        )
