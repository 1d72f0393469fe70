"""Right-padded rows without a padding mask, for models that are proven to need none.

In a causal model no token sees what stands after it, so padding on the right changes nothing
before it. Without a mask attention takes its causal path: half of the scores on a CPU, and on a GPU
the kernels that refuse masks.
"""

from __future__ import annotations

import inspect
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PretrainedConfig

from dschat.models.causal_lm import eval_mode, forward_inputs, takes_argument, unwrap
from dschat.models.packing import TOLERANCE
from dschat.utils.distributed import print_rank_0

_NEEDS_MASK: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_LENGTHS = (16, 11, 5)  # of the rows of the proof


def needed_mask(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor | None:
    """Return the mask of right-padded rows, or None where the model is proven to need none.

    Args:
        model: a causal LM, a reward model, or an engine around one; called twice at its first rows.
        input_ids: (B, T). attention_mask: (B, T) bool, False after each row's last token.
    """
    module = unwrap(model)
    if module not in _NEEDS_MASK:
        _NEEDS_MASK[module] = needed = not _is_causal(model, input_ids.device)
        if needed:
            print_rank_0(
                f"{type(module).__name__}: its tokens see the padding after them unless it is "
                "masked; right-padded batches keep their mask"
            )
    return attention_mask if _NEEDS_MASK[module] else None


def assume_causal(module: nn.Module) -> None:
    """Assume that the model needs no mask, where no values can prove it (fake tensors)."""
    _NEEDS_MASK[module] = False


def right_padded_inputs(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> dict:
    """Build the keyword arguments of a forward pass over right-padded rows; see `needed_mask`."""
    return forward_inputs(model, input_ids, needed_mask(model, input_ids, attention_mask))


@torch.no_grad()
def _is_causal(model: nn.Module, device: torch.device) -> bool:
    """Return whether a few rows come out alike, masked and padded one way, unmasked and another.

    The model's own padding token stands among the real ones too: a model that looks for it to find
    padding or positions is no longer the same without a mask.
    """
    module = unwrap(model)
    if (
        inspect.signature(module.forward).parameters["attention_mask"].default
        is inspect.Parameter.empty
    ):
        return False
    longest = max(_LENGTHS)
    mask = torch.arange(longest) < torch.tensor(_LENGTHS)[:, None]  # (3, 16)
    ids = torch.arange(mask.numel()).view_as(mask) % 60
    config = module.config
    assert isinstance(config, PretrainedConfig)
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    if pad is not None:
        ids[:, 3] = pad
    others = torch.where(mask, ids, 59 - ids)
    mask = mask.to(device)
    with eval_mode(model):
        masked = outputs(model, ids.to(device), mask)[mask]
        unmasked = outputs(model, others.to(device), None)[mask]
    difference = (masked.float() - unmasked.float()).abs().max()
    return bool(difference <= TOLERANCE[masked.dtype] * masked.float().abs().max())


def outputs(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """(B, T, V) logits or (B, T) values."""
    inputs = forward_inputs(model, input_ids, attention_mask)
    if takes_argument(model, "use_cache"):
        inputs["use_cache"] = False
    outputs = model(**inputs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits
