"""Counts of operations against hand-worked numbers and PyTorch's own counter."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, OPTConfig
from transformers.pytorch_utils import Conv1D

from dschat.errors import UserError
from dschat.utils.flops import (
    GATED_MLP,
    ModelShape,
    activation_factor,
    calculate_flops,
    causal_pairs,
    generation_flops,
    get_hf_configs,
    lora_overhead_factor,
    model_flops,
)

BATCH, LENGTH = 2, 7


def llama_config(**kwargs) -> LlamaConfig:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(**sizes, **heads, **ids, attn_implementation="eager", **kwargs)


def opt_config() -> OPTConfig:
    return OPTConfig(
        vocab_size=40,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=8,
        dropout=0.0,
        attn_implementation="eager",
    )


def counted_step(model: torch.nn.Module) -> tuple[int, int]:
    """FLOPs that PyTorch counts forward and backward."""
    ids = torch.randint(3, 40, (BATCH, LENGTH))
    counter = FlopCounterMode(display=False)
    # Left to itself, the recomputation stops short of each layer's last product.
    with counter, set_checkpoint_early_stop(False):
        logits = model(input_ids=ids, use_cache=False).logits
    forward = counter.get_total_flops()
    counter = FlopCounterMode(display=False)
    with counter:
        logits.sum().backward()
    return forward, counter.get_total_flops()


def test_lora_overhead_factor_of_opt_1_3b():
    assert lora_overhead_factor(128, 2048) == 0.125
    assert activation_factor(128, 2048, gradient_checkpointing=True) == 3.125
    assert activation_factor(128, 2048, gradient_checkpointing=False) == 2.125


def test_activation_factor_without_lora():
    assert activation_factor(0, 2048, gradient_checkpointing=True) == 4
    assert activation_factor(0, 2048, gradient_checkpointing=False) == 3


@pytest.mark.parametrize(("lora_dim", "hidden"), [(-1, 8), (1, 0), (1, -8)])
def test_lora_overhead_factor_refuses_bad_numbers(lora_dim, hidden):
    with pytest.raises(UserError, match=r"(lora_dim|hidden_size) (-1|0|-8):"):
        activation_factor(lora_dim, hidden, gradient_checkpointing=False)


def test_megatron_formula_by_hand():
    # 24 · 4 · (1 · 6) · 2 · 4² = 18432; 1 + 6/24 + 16/(16 · 2 · 4) = 1.375
    config = SimpleNamespace(num_hidden_layers=2, hidden_size=4, vocab_size=16)
    assert calculate_flops(4, 1, 6, config) == 25344
    with pytest.raises(UserError, match="above 0"):
        calculate_flops(4, 0, 6, config)


def test_get_hf_configs_reads_gpt2_names_and_unpacks():
    layers, hidden, vocab = get_hf_configs(SimpleNamespace(n_layer=3, n_embd=8, vocab_size=11))
    assert (layers, hidden, vocab) == (3, 8, 11)
    with pytest.raises(UserError, match="hidden_size"):
        get_hf_configs(SimpleNamespace(n_layer=3, vocab_size=11))


def small_shape(**kwargs) -> ModelShape:
    return ModelShape(
        num_layers=1,
        hidden_size=4,
        vocab_size=5,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        intermediate_size=3,
        gated_mlp=True,
        embed_dim=4,
        **kwargs,
    )


def test_model_flops_by_hand():
    # q 16, k 8, v 8, o 16, gate, up, down 12 each: 84 parameters in the layer; 20 in the head.
    # 3 tokens: 2·84·3 = 504; 6 causal pairs: 4·2·2·6 = 96; head 2·20·3 = 120.
    flops = model_flops(small_shape(), 3, causal_pairs(3), gradient_checkpointing=True)
    assert (flops.forward, flops.backward, flops.recompute) == (720, 1440, 600)
    assert (flops.model, flops.hardware) == (2160, 2760)


def test_model_flops_with_lora_by_hand():
    # Rank 1 adds in + out per matrix: q 8, k 6, v 6, o 8, MLP 3·7 = 49; 2·49·3 = 294.
    # Backward: frozen base 504 and head 120 once, adapters and attention twice.
    flops = model_flops(small_shape(), 3, 6, lora_dim=1)
    assert (flops.forward, flops.backward, flops.recompute) == (1014, 504 + 120 + 588 + 192, 0)
    both = model_flops(small_shape(), 3, 6, lora_dim=1, base_trainable=True)
    assert both.backward == 2 * 1014
    # A value head is one row of 4 and trains beside a frozen base: 2·4·3 forward, twice backward.
    reward = model_flops(small_shape(value_head=True), 3, 6, lora_dim=1)
    assert (reward.forward, reward.backward) == (894 + 24, 504 + 588 + 192 + 48)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_llama_with_grouped_queries_agrees_with_pytorch(checkpointing, tied):
    config = llama_config(tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    # The eager kernel computes the full square, not its causal half.
    flops = model_flops(
        ModelShape.from_config(config),
        BATCH * LENGTH,
        BATCH * LENGTH**2,
        gradient_checkpointing=checkpointing,
    )
    forward, backward = counted_step(model)
    assert forward == flops.forward
    assert backward == flops.backward + flops.recompute
    assert (flops.recompute > 0) == checkpointing


def test_llama_with_lora_agrees_with_pytorch():
    config = llama_config()
    model = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
    model.enable_input_require_grads()  # as with checkpointing: layer 0 owes its input gradient
    flops = model_flops(
        ModelShape.from_config(config), BATCH * LENGTH, BATCH * LENGTH**2, lora_dim=3
    )
    assert counted_step(model.train()) == (flops.forward, flops.backward)


def test_opt_with_projected_embedding_agrees_with_pytorch():
    config = opt_config()
    model = AutoModelForCausalLM.from_config(config).train()
    flops = model_flops(ModelShape.from_config(config), BATCH * LENGTH, BATCH * LENGTH**2)
    assert counted_step(model) == (flops.forward, flops.backward)


def test_generation_with_cache_agrees_with_pytorch():
    config, new = opt_config(), 4
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 40, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    assert out.shape == (BATCH, LENGTH + new)
    shape = ModelShape.from_config(config)
    causal = generation_flops(shape, BATCH * LENGTH, BATCH * new, BATCH)
    # The eager prefill computes the full square: the pairs above the diagonal are not ours.
    above_diagonal = 4 * 2 * 16 * BATCH * LENGTH * (LENGTH - 1) // 2
    assert counter.get_total_flops() == causal + above_diagonal


@pytest.mark.parametrize("model_type", sorted(GATED_MLP))
def test_matrices_of_every_known_type(model_type):
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if model_type == "gpt_neo":
        sizes = {"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
        sizes["attention_types"] = [[["global"], 2]]
    elif model_type == "gptj":
        sizes["rotary_dim"] = 4
    elif model_type == "opt":
        sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 16}
    elif model_type == "gpt_neox":
        sizes["intermediate_size"] = 48
    elif model_type not in ("gpt2", "bloom"):
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **sizes, **ids)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    assert ModelShape.from_config(config).matmul_params == sum(m.weight.numel() for m in linears)


def test_unknown_type_is_refused_by_name():
    with pytest.raises(UserError, match=r"'mamba'.*llama"):
        ModelShape.from_config(SimpleNamespace(model_type="mamba"))
