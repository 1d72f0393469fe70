"""Tiny models of many families: with a sequence classifier in transformers, and without."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.helpers import tiny

_GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 16,  # layers differ in their heads, as in the real ones
    "vocab_size_per_layer_input": tiny.VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
_LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
_DEEPSEEK4 = {
    **{"head_dim": 8, "num_key_value_heads": 1, "q_lora_rank": 8, "qk_rope_head_dim": 4},
    **{"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"layer_types": ["sliding_attention", "sliding_attention"], "index_n_heads": 2},
    **{"o_groups": 2, "o_lora_rank": 8, "index_head_dim": 8},
}
# Without a classifier.
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
    "deepseek_v4": ("DeepseekV4Config", _DEEPSEEK4),
}

_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
# With one; positions are learnt, read from the mask, rotated or ALiBi's, windows are 4 tokens.
CLASSIFIED: dict[str, tuple[str, dict]] = {
    "opt": ("OPTConfig", {"ffn_dim": 48, "init_std": 0.2, "dropout": 0.0}),
    "opt-350m": (
        "OPTConfig",
        {"ffn_dim": 48, "init_std": 0.2, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "gpt2": ("GPT2Config", {"n_positions": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}),
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, **_WINDOWS}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "neox": ("GPTNeoXConfig", {}),
}


def family_config(name: str, **changes: object) -> PretrainedConfig:
    """The shape of one of `FAMILIES` or `CLASSIFIED`."""
    kind, own = (FAMILIES | CLASSIFIED)[name]
    return getattr(transformers, kind)(**{**tiny.SHAPE, **own, **changes})


def save_family(folder: Path, name: str) -> str:
    """A folder of a causal LM of one of `FAMILIES` or `CLASSIFIED`, with the byte tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(family_config(name)).save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return str(folder)
