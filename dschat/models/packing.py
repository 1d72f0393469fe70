"""Packed sequences in one row of a model: the masks and positions that keep them apart."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dschat.errors import UserError
from dschat.models.attention import is_flash
from dschat.models.causal_lm import eval_mode, takes_argument, unwrap
from dschat.models.config import build_causal_lm, load_config
from dschat.utils.flops import layer_configs

MASKED = ("sdpa", "eager")  # attention that takes a mask of its own for each query
# Layers of other kinds carry a state from each token to the next, which no mask interrupts.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_UNPACKED = "drop packing, or give max_tokens_per_batch, which saves padding with any model"

# Largest difference of a sequence's logits between two sets of neighbours, or two paddings, over
# the largest logit: rounding, and no more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def packed_inputs(model: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor) -> dict:
    """Build the keyword arguments of a forward pass in which each sequence sees itself alone.

    Flash attention skips what lies between sequences and takes their bounds, others a mask.

    Args:
        input_ids: (B, T). position_ids: (B, T), 0 where a sequence begins and on padding.
    """
    module = _language_model(model)
    if is_flash(module.config._attn_implementation):
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            **sequence_bounds(position_ids),
        }
    return masked_inputs(module, input_ids, packed_mask(position_ids), position_ids)


def masked_inputs(
    model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor, position_ids: torch.Tensor
) -> dict:
    """Build the keyword arguments of a forward pass under a (B, 1, T, T) mask, True sees."""
    module = _language_model(model)
    if module.config._attn_implementation == "eager":  # adds its mask to the scores
        dtype = module.dtype
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}


def _language_model(model: nn.Module) -> PreTrainedModel:
    module = unwrap(model)
    assert isinstance(module, PreTrainedModel), type(module)
    return module


def packed_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """Mask of packed rows: (B, T) positions -> (B, 1, T, T) bool; [b, 0, q, k]: q may see k."""
    sequence = (position_ids == 0).cumsum(dim=-1)
    same = sequence[:, None, :, None] == sequence[:, None, None, :]
    return same.tril()


def sequence_bounds(position_ids: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """Bounds of the sequences in packed rows laid end to end, as transformers takes them.

    Args:
        position_ids: (B, T), as in `packed_inputs`; a padding token counts as a sequence.
    """
    flat = position_ids.flatten()
    end = torch.tensor([len(flat)], device=flat.device)
    bounds = torch.cat([(flat == 0).nonzero().flatten(), end]).to(torch.int32)
    longest = int(position_ids.max()) + 1
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def check_packing(
    model_name_or_path: str, max_seq_len: int, attn_implementation: str | None = None
) -> None:
    """Raise an error when this model cannot keep packed sequences apart; reads the config alone.

    Raises:
        UserError: with what the model has that packing cannot serve.
    """
    config = load_config(model_name_or_path, attn_implementation=attn_implementation)
    with torch.device("meta"):
        module = build_causal_lm(config)
    refuse_unpackable(module, model_name_or_path, max_seq_len)


def refuse_unpackable(model: nn.Module, name: str, max_seq_len: int) -> None:
    """Raise an error when this model, with or without weights, cannot keep sequences apart.

    Raises:
        UserError: naming the model by `name`.
    """
    module = _language_model(model)
    problem = obstacle(module, module.config, max_seq_len)
    if problem is not None:
        raise UserError(f"packing: model {name} {problem}; {_UNPACKED}")


def obstacle(module: nn.Module, config: PretrainedConfig, max_seq_len: int) -> str | None:
    """Say what keeps a model from serving several sequences in one row; None: nothing known."""
    if getattr(config, "alibi", False) or not takes_argument(module, "position_ids"):
        return "takes no position_ids (ALiBi, or a recurrent state), so none can restart"
    used = config._attn_implementation
    if used not in MASKED and not is_flash(used):
        return f"uses {used} attention; sequences are kept apart in sdpa, eager and flash attention"
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others:
        return f"has layers of {', '.join(sorted(others))}, whose state runs on from row to row"
    for name in ("sliding_window", "attention_chunk_size"):
        reaches = [getattr(of_layer, name, None) for of_layer in layer_configs(config)]
        reach = min((r for r in reaches if isinstance(r, int)), default=max_seq_len)
        in_use = name != "sliding_window" or getattr(config, "use_sliding_window", True)
        if in_use and reach < max_seq_len:
            return (
                f"has {name} {reach}, which a mask between packed sequences would replace: "
                f"it must reach over max_seq_len {max_seq_len}"
            )
    return None


@torch.no_grad()
def prove_packing(model: nn.Module, device: torch.device) -> None:
    """Check that a sequence has the same logits at two places among different neighbours.

    It finds what the checks of the config cannot know of each architecture; two passes over 16
    tokens, on every rank.

    Raises:
        UserError: neighbours are seen, or positions do not restart.
    """
    logits_at = []  # of the same four tokens, (4, V)
    for before, after, first in ((5, 7, 10), (7, 5, 30)):
        lengths = (before, 4, after)
        ids = torch.arange(first, first + 16) % 60
        ids[before : before + 4] = torch.tensor([3, 5, 4, 6])
        positions = torch.cat([torch.arange(n) for n in lengths])
        inputs = packed_inputs(model, ids[None].to(device), positions[None].to(device))
        with eval_mode(model):
            logits = model(**inputs, use_cache=False).logits
        logits_at.append(logits[0, before : before + 4].float())
    one, other = logits_at
    difference = ((one - other).abs().max() / one.abs().max()).item()
    if not difference <= TOLERANCE[_language_model(model).dtype]:
        raise UserError(
            f"packing: this model's logits depend on a sequence's neighbours (by {difference:.1%} "
            f"of the largest); {_UNPACKED}"
        )
