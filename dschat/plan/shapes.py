"""Shapes of well-known models, so that a plan needs neither files nor a network.

Sizes are those of the config.json that the authors published with each model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

from transformers import (
    BloomConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
)

from dschat.errors import UserError
from dschat.models.config import load_config
from dschat.settings import unknown


def _opt(hidden: int, layers: int, heads: int, projection: int | None = None) -> OPTConfig:
    return OPTConfig(
        hidden_size=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        word_embed_proj_dim=projection or hidden,
        do_layer_norm_before=projection is None,
        vocab_size=50272,
        max_position_embeddings=2048,
    )


def _llama(
    vocabulary: int,
    ffn: int,
    kv_heads: int,
    positions: int,
    *,
    hidden: int = 4096,
    layers: int = 32,
    heads: int = 32,
    tied: bool = False,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
    )


_smollm2 = functools.partial(_llama, 49152, positions=8192, tied=True)


def _qwen3(hidden: int, ffn: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
    )


def _gemma3_text(
    vocabulary: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, window: int
) -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=256,
        sliding_window=window,
        max_position_embeddings=32768,
    )


def _gemma3_4b() -> Gemma3Config:
    text = _gemma3_text(262208, 2560, 10240, 34, 8, 4, 1024)
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return Gemma3Config(text_config=text.to_dict(), vision_config=vision)


KNOWN: dict[str, Callable[[], PretrainedConfig]] = {
    "opt-125m": lambda: _opt(768, 12, 12),
    "opt-350m": lambda: _opt(1024, 24, 16, projection=512),
    "opt-1.3b": lambda: _opt(2048, 24, 32),
    "opt-2.7b": lambda: _opt(2560, 32, 32),
    "opt-6.7b": lambda: _opt(4096, 32, 32),
    "opt-13b": lambda: _opt(5120, 40, 40),
    "opt-30b": lambda: _opt(7168, 48, 56),
    "opt-66b": lambda: _opt(9216, 64, 72),
    "llama-2-7b": lambda: _llama(32000, 11008, 32, 4096),
    "llama-3-8b": lambda: _llama(128256, 14336, 8, 8192),
    "smollm2-135m": lambda: _smollm2(1536, 3, hidden=576, layers=30, heads=9),
    "smollm2-360m": lambda: _smollm2(2560, 5, hidden=960, heads=15),
    "smollm2-1.7b": lambda: _smollm2(8192, 32, hidden=2048, layers=24),
    "qwen3-0.6b": lambda: _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": lambda: _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": lambda: _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": lambda: _qwen3(4096, 12288, 36, 32, tied=False),
    "gemma-3-1b": lambda: _gemma3_text(262144, 1152, 6912, 26, 4, 1, 512),
    "gemma-3-4b": _gemma3_4b,
    "bloom-1b1": lambda: BloomConfig(vocab_size=250880, hidden_size=1536, n_layer=24, n_head=16),
    "mgpt": lambda: GPT2Config(
        vocab_size=100000, n_embd=2048, n_layer=24, n_head=16, n_positions=2048
    ),
}
_WORDS = re.compile("|".join(re.escape(name) for name in sorted(KNOWN, key=len, reverse=True)))


def known_in(text: str) -> list[str]:
    """List the well-known models that a text names, in its order: `an OPT-1.3B actor`."""
    return _WORDS.findall(text.lower())


def config_of(name: str) -> PretrainedConfig:
    """Config of a model folder, or of a well-known model by its name or hub id.

    Raises:
        UserError: neither.
    """
    if Path(name).expanduser().is_dir():
        return load_config(name)
    found = known_in(name.rsplit("/", 1)[-1])
    if not found:
        known = "; a folder with a config.json, or one of " + ", ".join(KNOWN)
        raise UserError(unknown("model", name, [*KNOWN], known))
    return KNOWN[found[0]]()
