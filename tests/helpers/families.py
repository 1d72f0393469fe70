"""Tiny models of families that have no sequence classifier in transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.helpers import tiny

_GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 8,
    "vocab_size_per_layer_input": tiny.VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
_LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
FAMILIES: dict[str, tuple[str, dict]] = {
    "granite": ("GraniteConfig", {}),
    "cohere": ("CohereConfig", {}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gemma4": ("Gemma4TextConfig", _GEMMA4),
    "llama4": ("Llama4TextConfig", _LLAMA4),
    "lfm2": (
        "Lfm2Config",
        {"block_multiple_of": 8, "layer_types": ["conv", "full_attention"]},
    ),
}


def family_config(name: str, **changes: object) -> PretrainedConfig:
    """The shape of one of `FAMILIES`."""
    kind, own = FAMILIES[name]
    return getattr(transformers, kind)(**{**tiny.SHAPE, **own, **changes})


def save_family(folder: Path, name: str) -> str:
    """A folder of a causal LM of one of `FAMILIES`, with the byte tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(family_config(name)).save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return str(folder)
