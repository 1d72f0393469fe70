"""Tiny models and a tokenizer, made on the spot for tests and for the scripts that tests start."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dschat.models.reward_model import RewardModel
from dschat.utils.module.lora import (
    convert_linear_layer_to_lora,
    lora_layers,
    only_optimize_lora_parameters,
)
from dschat.utils.module.lora_config import LoraConfig

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 264  # 3 special tokens and 256 bytes, up to a multiple of 8
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte after `<pad>` 0, `<s>` 1, `</s>` 2; with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        prompt_format="dschat",  # the template is there to be saved, not used: it names no roles
    )


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    **SPECIAL,
}


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Two layers of width 32 whose weights are large enough for lively logits."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).eval()


def tiny_gpt2(seed: int = 0) -> PreTrainedModel:
    """GPT-2 of two layers: Conv1D layers, LayerNorms called `ln_*`, a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel  # here: seconds for who needs it not

    torch.manual_seed(seed)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, initializer_range=0.2, **shape, **dropout, **SPECIAL)
    ).eval()


def tiny_opt(seed: int = 0, word_embed_proj_dim: int = 32) -> PreTrainedModel:
    """OPT of two layers; with another `word_embed_proj_dim` it has projections, as opt-350m."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=word_embed_proj_dim,
            dropout=0.0,
            init_std=0.2,
            **SPECIAL,
        )
    ).eval()


def tiny_falcon(seed: int = 0) -> PreTrainedModel:
    """Falcon of two layers, which ask their config for dropout at every pass."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return FalconForCausalLM(
        FalconConfig(vocab_size=VOCABULARY, initializer_range=0.2, **shape, **SPECIAL)
    ).eval()


MOE = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [0],
    },
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 40, "head_dim": 8},
}


def tiny_moe(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A mixture of four experts, two (Llama 4: one) for each token, in two layers of width 32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "num_experts_per_tok": 1 if name == "llama4_text" else 2,
        **SPECIAL,
    }
    config = AutoConfig.for_model(name, **{**settings, **MOE[name], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # lively, and biases and sinks that are not zero
            if parameter.ndim > 1 or not parameter.any():
                parameter.normal_(std=0.2)
    return model


ARCHITECTURES = {
    "llama": tiny_llama,
    "llama-tied": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
    "opt": tiny_opt,
    "opt-projected": lambda: tiny_opt(word_embed_proj_dim=16),
}


def reward_model(name: str = "llama") -> RewardModel:
    """A trunk of `ARCHITECTURES` under a random head."""
    causal = ARCHITECTURES[name]()
    torch.manual_seed(7)
    return RewardModel(causal.base_model).eval()


def adapted(module: nn.Module, **options: object) -> nn.Module:
    """The module with adapters that are no longer zero, as after some training."""
    convert_linear_layer_to_lora(module, LoraConfig(**{"lora_dim": 4, **options}))
    torch.manual_seed(1)
    for layer in lora_layers(module).values():
        nn.init.normal_(layer.lora_A, std=0.2)
        nn.init.normal_(layer.lora_B, std=0.2)
    return only_optimize_lora_parameters(module)


def save_llama_folder(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A model folder with weights and tokenizer."""
    tiny_llama(seed, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def token_rows(count: int, seed: int, longest: int = 14) -> list[list[int]]:
    """Rows of 6 to `longest` random byte tokens, each ending in `</s>`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, longest, (count,), generator=generator).tolist()
    return [
        [*torch.randint(3, 200, (length,), generator=generator).tolist(), EOS] for length in lengths
    ]


def padded(rows: list[list[int]], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded (B, T) ids and bool mask, as wide as the longest row or as asked."""
    width = width or max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return ids, mask
