"""Counts of operations against hand-worked numbers and PyTorch's own counter."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, OPTConfig

from dschat.errors import UserError
from dschat.models.packing import obstacle
from dschat.models.reward_model import RewardModel
from dschat.plan.ppo import cache_bytes
from dschat.utils.flops import (
    Matrices,
    activation_factor,
    calculate_flops,
    causal_pairs,
    forward_flops,
    generation_flops,
    get_hf_configs,
    lora_overhead_factor,
    training_flops,
)
from dschat.utils.module.lora import convert_linear_layer_to_lora, only_optimize_lora_parameters
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers import tiny
from tests.helpers.families import family_config

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


def counting() -> FlopCounterMode:
    """PyTorch's counter, which leaves out products that are added in place."""

    def addmm_(_, a: torch.Size, b: torch.Size, **options) -> int:
        return 2 * a.numel() * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_})


def counted_step(model: torch.nn.Module) -> tuple[int, int]:
    """FLOPs that PyTorch counts forward and backward."""
    ids = torch.randint(3, 40, (BATCH, LENGTH))
    counter = counting()
    # Left to itself, the recomputation stops short of each layer's last product.
    with counter, set_checkpoint_early_stop(False):
        logits = model(input_ids=ids, use_cache=False).logits
    forward = counter.get_total_flops()
    counter = counting()
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


# q 16, k 8, v 8, o 16, gate, up, down 12 each: 84 parameters in the layer; 20 in the head.
SMALL = Matrices(trunk=84, adapters=0, head=20, trained=104, attention=2 * 2)


def test_sizes_are_those_of_the_part_that_reads_text():
    text = {"num_hidden_layers": 3, "hidden_size": 16, "vocab_size": 40}
    vision = {"num_hidden_layers": 5, "hidden_size": 8}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    assert get_hf_configs(config) == (3, 16, 40)


def test_training_flops_by_hand():
    # 3 tokens: 2·84·3 = 504; 6 causal pairs: 4·2·2·6 = 96; head 2·20·3 = 120.
    assert training_flops(SMALL, 3, causal_pairs(3)) == (720, 1440)


def test_training_flops_with_lora_by_hand():
    # Rank 1 adds in + out per matrix: q 8, k 6, v 6, o 8, MLP 3·7 = 49; 2·49·3 = 294.
    # Backward: frozen base 504 and head 120 once, adapters and attention twice.
    lora = dataclasses.replace(SMALL, adapters=49, trained=49)
    assert training_flops(lora, 3, 6) == (1014, 504 + 120 + 588 + 192)
    assert forward_flops(lora, 3, 6, 3, adapters=False) == 720
    both = dataclasses.replace(lora, trained=84 + 49 + 20)
    assert training_flops(both, 3, 6)[1] == 2 * 1014
    # A value head is one row of 4 and trains beside a frozen base: 2·4·3 forward, twice backward.
    reward = dataclasses.replace(lora, head=4, trained=49 + 4)
    assert training_flops(reward, 3, 6) == (894 + 24, 504 + 588 + 192 + 48)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_llama_with_grouped_queries_agrees_with_pytorch(checkpointing, tied):
    config = llama_config(tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    matrices = Matrices.of(model, config)
    # The eager kernel computes the full square, not its causal half.
    forward, backward = training_flops(matrices, BATCH * LENGTH, BATCH * LENGTH**2)
    again = forward_flops(matrices, BATCH * LENGTH, BATCH * LENGTH**2, 0) if checkpointing else 0
    assert counted_step(model) == (forward, backward + again)


@pytest.mark.parametrize("trains_base", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])  # by one product or by several
def test_llama_with_lora_agrees_with_pytorch(trains_base, dropout):
    config = llama_config()
    model = AutoModelForCausalLM.from_config(config).train()
    convert_linear_layer_to_lora(model, LoraConfig(lora_dim=3, lora_dropout=dropout))
    only_optimize_lora_parameters(model)
    if trains_base:
        model.requires_grad_(True)
    model.enable_input_require_grads()  # as with checkpointing: layer 0 owes its input gradient
    flops = training_flops(Matrices.of(model, config), BATCH * LENGTH, BATCH * LENGTH**2)
    assert counted_step(model) == flops


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "qwen2", "gemma2", "phi", "bloom"])
def test_other_families_agree_with_pytorch(model_type):
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if model_type not in ("gpt2", "bloom"):
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **sizes, **ids)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    flops = training_flops(Matrices.of(model, config), BATCH * LENGTH, BATCH * LENGTH**2)
    assert counted_step(model) == flops


def test_heads_that_differ_between_layers_are_added_up():
    """Gemma 4: a layer of windows has 4 heads of 8, the other 4 of 16; keys and values half."""
    config = family_config("gemma4")
    assert Matrices.of(AutoModelForCausalLM.from_config(config), config).attention == 4 * (8 + 16)
    assert cache_bytes(config, torch.float32) == 2 * 2 * (8 + 16) * 4
    assert obstacle(AutoModelForCausalLM.from_config(config), config, 8) is None


def test_opt_with_projected_embedding_agrees_with_pytorch():
    config = opt_config()
    model = AutoModelForCausalLM.from_config(config).train()
    flops = training_flops(Matrices.of(model, config), BATCH * LENGTH, BATCH * LENGTH**2)
    assert counted_step(model) == flops


def test_generation_with_cache_agrees_with_pytorch():
    config, new = opt_config(), 4
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 40, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    assert out.shape == (BATCH, LENGTH + new)
    causal = generation_flops(Matrices.of(model, config), BATCH * LENGTH, BATCH * new, BATCH)
    # The eager prefill computes the full square: the pairs above the diagonal are not ours.
    above_diagonal = 4 * 2 * 16 * BATCH * LENGTH * (LENGTH - 1) // 2
    assert counter.get_total_flops() == causal + above_diagonal


def test_a_reward_model_trains_its_head_beside_the_adapters():
    base = tiny.tiny_llama()
    width = base.config.hidden_size
    trunk = Matrices.of(base, base.config).trunk
    model = tiny.adapted(RewardModel(base.model))
    only_optimize_lora_parameters(model)
    matrices = Matrices.of(model, model.config)
    assert (matrices.trunk, matrices.head) == (trunk, width)
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert (matrices.adapters, matrices.trained) == (adapters, adapters + width)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_a_token_meets_some_experts_as_pytorch_counts(name):
    """Its experts one by one, PyTorch's counter does not know the grouped product."""
    model = tiny.tiny_moe(name, attn_implementation="eager").train()
    model.set_experts_implementation("eager")
    sizes = BATCH * LENGTH, BATCH * LENGTH**2
    assert counted_step(model) == training_flops(Matrices.of(model, model.config), *sizes)
    convert_linear_layer_to_lora(only_optimize_lora_parameters(model), LoraConfig(lora_dim=3))
    model.enable_input_require_grads()
    matrices = Matrices.of(model, model.config)
    assert counted_step(model) == training_flops(matrices, *sizes)
    assert matrices.mixture and matrices.trained == matrices.adapters


def test_what_these_do_not_compute_has_no_exact_count():
    sizes = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 1}
    config = AutoConfig.for_model("mamba", **sizes)
    with torch.device("meta"):
        assert Matrices.of(AutoModelForCausalLM.from_config(config), config) is None
    silent = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 264, "num_heads": 4}
    assert Matrices.of(tiny.tiny_moe("mixtral"), SimpleNamespace(**silent)) is None


def test_a_model_without_attention_heads_has_no_exact_count():
    config = SimpleNamespace(num_hidden_layers=1, hidden_size=4, vocab_size=16)
    assert Matrices.of(torch.nn.Linear(4, 4), config) is None
