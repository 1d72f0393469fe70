"""Rows of single tokens that train in a frozen embedding and a frozen head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PhiConfig, PhiForCausalLM

from dschat.errors import UserError
from dschat.models.causal_lm import grow_vocabulary
from dschat.models.logprobs import answer_logprobs
from dschat.utils.module.lora import (
    adapters_disabled,
    convert_linear_layer_to_lora,
    convert_lora_to_linear_layer,
    fused_adapters,
    merged_state_dict,
    only_optimize_lora_parameters,
)
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.token_rows import token_rows
from dschat.utils.module.token_tables import add_token_rows, tables_of
from dschat.utils.module.untrained_rows import TokenChoice, alike_rows
from dschat.utils.optim import get_optimizer_grouped_parameters
from dschat.utils.optim_config import OptimizerConfig
from tests.helpers import tiny
from tests.helpers.adapters import IDS, as_trained, assert_equal, logits_of
from tests.helpers.rounding import DIFFERENT, IN_A_ROW, LOGITS
from tests.helpers.tiers import tiers

TOKENS = [2, 40, 7]


def with_rows(name: str = "llama", lora: LoraConfig | None = None) -> nn.Module:
    """Adapters and rows, nothing moved yet."""
    model = tiny.ARCHITECTURES[name]()
    convert_linear_layer_to_lora(model, lora or LoraConfig(lora_dim=4))
    return only_optimize_lora_parameters(add_token_rows(model, TOKENS))


def gemma() -> nn.Module:
    """An embedding that multiplies its rows by the root of the width."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY}
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape, **heads)).eval()


@pytest.mark.parametrize("name", tiers([*tiny.ARCHITECTURES, "gemma"], ["llama", "llama-tied"]))
def test_rows_start_as_the_base_and_go_back_to_it_bit_for_bit(monkeypatch, name: str):
    monkeypatch.setitem(tiny.ARCHITECTURES, "gemma", gemma)
    base = logits_of(tiny.ARCHITECTURES[name]())
    model = with_rows(name)
    assert torch.equal(logits_of(model), base)
    trained = logits_of(as_trained(model))
    assert not torch.allclose(trained, base, atol=DIFFERENT)
    with adapters_disabled(model):
        assert torch.equal(logits_of(model), base)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with fused_adapters(model):
        assert_equal(logits_of(model), trained)
        assert not any(layer.adapter_enabled for layer in token_rows(model).values())
    assert torch.equal(logits_of(model), trained)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    plain = tiny.ARCHITECTURES[name]()
    plain.load_state_dict(merged_state_dict(model.state_dict(), model))
    assert_equal(logits_of(plain), trained)
    kind = type(plain.get_input_embeddings())
    if name in ("llama", "gemma"):  # adapters on tied tables are none here: all can merge in place
        convert_lora_to_linear_layer(model)
        assert type(model.get_input_embeddings()) is kind
        assert_equal(logits_of(model), trained)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt-projected"])
def test_gradients_are_those_of_the_rows_of_a_table_that_trains(name: str):
    """A dense gradient of each table, by plain autograd, read at the rows."""
    model, dense = with_rows(name), tiny.ARCHITECTURES[name]()
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (model, dense)]
    for loss in losses:
        loss.backward()
    plain = tables_of(dense)
    for table_name, table in token_rows(model).items():
        assert table.tokens.tolist() == sorted(TOKENS)
        assert table.weight.grad is None and not table.weight.requires_grad
        expected = plain[table_name].weight.grad[table.tokens]
        torch.testing.assert_close(table.lora_token_rows.grad, expected, rtol=0, atol=IN_A_ROW)
    own = {id(table.lora_token_rows) for table in token_rows(model).values()}
    assert len(own) == (2 if name == "llama" else 1)


def test_a_pass_keeps_the_rows_and_no_table_but_the_heads_own():
    """What autograd holds: of tensors as large as a table the head's frozen weight alone."""
    model = with_rows("llama")
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.lm_head(model.model.embed_tokens(IDS))
    large = {t.data_ptr() for t in kept if t.numel() >= tiny.VOCABULARY * 32}
    assert large == {model.lm_head.weight.data_ptr()}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 3 * 32 + sum(
        p.numel() for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B"))
    )


def test_rows_are_a_group_of_their_own():
    groups = get_optimizer_grouped_parameters(
        with_rows("llama-tied"), OptimizerConfig(learning_rate=1e-4, weight_decay=0.1)
    )
    (rows,) = [g for g in groups if g["name"] == "token_rows"]
    assert [tuple(p.shape) for p in rows["params"]] == [(3, 32)]
    assert rows["weight_decay"] == 0.0 and rows["lr"] == pytest.approx(16e-4)
    given = OptimizerConfig(trainable_tokens_learning_rate=2e-3)
    assert given.rate("token_rows") == 2e-3


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_scoring_in_blocks_sees_the_rows(monkeypatch, name: str):
    """PPO's log-probabilities, made block by block from the head, and their gradient."""
    monkeypatch.setattr("dschat.models.head_blocks.BLOCK_BYTES", 4 * tiny.VOCABULARY * 5)
    model = as_trained(with_rows(name))
    ids = IDS[:, :8].clone()
    ids[:, 6] = 2
    found = answer_logprobs(model, ids, torch.ones_like(ids, dtype=torch.bool), 4).logprobs
    logprobs = model(ids).logits[:, 3:-1].log_softmax(-1)
    expected = logprobs.gather(-1, ids[:, 4:, None]).squeeze(-1)
    assert_equal(found, expected)
    rows = token_rows(model)["lm_head"].lora_token_rows
    grads = [torch.autograd.grad(x.sum(), rows, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=LOGITS)


def test_rows_alike_are_counted():
    """By hand: 1, 2 and 4 point one way, 3 the other, 0 and 5 are as good as zero."""
    one = torch.tensor([1.0, 2.0])
    table = torch.stack(
        [0 * one, one, 3 * one, -one, 0.5 * one, 1e-20 * one, torch.tensor([2.0, -1])]
    )
    assert alike_rows(table, [0, 1, 3, 6]) == [1, 2, 0, 0]
    many = one.repeat(20_000, 1)  # more than a block
    assert alike_rows(many, [0, 19_999]) == [19_999, 19_999]


@torch.no_grad()
def clustered(model: nn.Module, table: nn.Module, tokens: list[int]) -> nn.Module:
    """The model with these rows of a table nearly the same."""
    table.weight[tokens] = table.weight[tokens[0]] + 1e-3 * torch.randn(len(tokens), 32)
    return model


def test_untrained_rows_are_found():
    choice = TokenChoice({2: "</s>", 40: "<x>", 41: "<y>"}, predicted=frozenset({2, 41}))
    assert choice.reasons(tables_of(tiny.tiny_llama())) == {}
    model = tiny.tiny_llama()
    clustered(model, model.lm_head, [2, *range(100, 108)])  # like 8 others: not yet many
    assert choice.reasons(tables_of(model)) == {}
    clustered(model, model.lm_head, [2, 40, *range(100, 107)])
    found = choice.reasons(tables_of(clustered(model, model.lm_head, [2, 40, *range(100, 108)])))
    assert found == {2: "its row of lm_head is like 9 others"}  # 40 is never predicted
    model = tiny.tiny_llama()
    found = choice.reasons(
        tables_of(clustered(model, model.model.embed_tokens, [40, *range(100, 109)]))
    )
    assert found == {40: "its row of model.embed_tokens is like 9 others"}
    assert choice.described(found) == "'<x>' (40: its row of model.embed_tokens is like 9 others)"


def test_new_rows_are_found():
    model = tiny.tiny_llama()
    grow_vocabulary(model, tiny.VOCABULARY + 1)
    choice = TokenChoice({2: "</s>", 264: "<end>"}, predicted=frozenset({2, 264}))
    assert choice.reasons(tables_of(model)) == {264: "new"}
    added = TokenChoice({260: "<end>"}, added=frozenset({260}))  # a row that the base had spare
    assert added.reasons(tables_of(tiny.tiny_llama())) == {260: "new"}


def test_tables_that_cannot_have_rows_are_refused():
    def stops(model: nn.Module, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            add_token_rows(model, [2])
        assert all(word in str(caught.value) for word in words), str(caught.value)

    lora = LoraConfig(lora_dim=2, lora_module_name=("embed_tokens", "q_proj"))
    adapted = convert_linear_layer_to_lora(tiny.tiny_llama(), lora)
    stops(adapted, "model.embed_tokens (LoRAEmbedding) has an adapter", "modules_to_save")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    phi = PhiForCausalLM(PhiConfig(vocab_size=64, num_attention_heads=4, **shape))
    stops(phi, "lm_head has a bias", "modules_to_save embed_tokens lm_head")
    with pytest.raises(ValueError, match="no tokens are given"):
        add_token_rows(tiny.tiny_llama(), [])
    with pytest.raises(UserError, match=r"has 264 rows; give ids below"):
        add_token_rows(tiny.tiny_llama(), [264])


def test_tables_that_train_fully_are_left_out():
    model = tiny.tiny_llama()
    add_token_rows(model, [2], tables_of(model, ["lm_head"]))
    assert [*token_rows(model)] == ["model.embed_tokens"]
    tied = tiny.tiny_llama(tie_word_embeddings=True)
    assert tables_of(tied, ["model.embed_tokens"]) == {}  # the head trains with it
