"""Layers that a plan runs in place of all."""

import pytest
import torch
import transformers

from dschat.models.config import build_causal_lm
from dschat.plan.layers import decoder_layers, layers_to_run

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 99}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
# One full layer after five that slide, of heads twice as wide.
WIDE = {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "head_dim": 8}
GEMMA4 = {**WIDE, "global_head_dim": 16, "vocab_size_per_layer_input": 99}


@pytest.mark.parametrize(
    ("family", "sizes", "places"),
    [
        ("Llama", {"num_hidden_layers": 9}, [0, 1, 2]),
        ("Llama", {"num_hidden_layers": 2}, [0, 1]),
        ("Glm4Moe", {"num_hidden_layers": 9, "first_k_dense_replace": 4, **EXPERTS}, range(6)),
        ("Gemma4Text", {"num_hidden_layers": 18, **GEMMA4}, [0, 1, 2, 5, 11]),
        ("GPTNeo", {"num_layers": 8, "attention_types": [[["global", "local"], 4]]}, range(5)),
        ("Lfm2", {"layer_types": ["conv", "full_attention"] * 4, "num_hidden_layers": 8}, range(5)),
        ("Mamba", {"num_hidden_layers": 6}, [0, 1, 2]),
        ("LongcatFlash", {"num_layers": 3}, range(3)),
    ],
)
def test_a_few_layers_of_each_kind(family: str, sizes: dict, places):
    """Of kinds that the config lists, those that weights show, and where neither can be moved."""
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **sizes})
    layers = layers_to_run(config, build_causal_lm)
    with torch.device("meta"):
        few, every = (
            [[p.shape for p in layer.parameters()] for layer in decoder_layers(module, of)]
            for of in (layers.config, config)
            for module in [build_causal_lm(of)]
        )
    assert few == [every[place] for place in places]
    assert layers.counts.total() == len(every)
