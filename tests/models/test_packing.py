"""Packed rows: the loss and its gradients are those of the same sequences one by one."""

import pytest
import torch
from torch import nn
from transformers import BloomConfig, GPTNeoXConfig, LlamaConfig, MistralConfig

from dschat.data.collators import PackedCollator, SFTCollator
from dschat.errors import UserError
from dschat.models import packing
from dschat.models.packing import check_packing, packed_mask, prove_packing
from dschat.train.evaluation import answer_loss, trained_tokens
from tests.helpers.rounding import GRADIENTS, IN_A_ROW, LOGITS
from tests.helpers.tiny import PAD, VOCABULARY, tiny_gpt2, tiny_llama, tiny_opt, token_rows

CPU = torch.device("cpu")
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt}


def _rows(count: int, seed: int) -> list[dict]:
    rows = token_rows(count, seed)
    return [{"input_ids": ids, "trained": [3, len(ids)], "length": len(ids)} for ids in rows]


def _gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_the_packed_loss_and_its_gradients_are_the_unpacked(name, attention):
    model, rows = MODELS[name](), _rows(7, seed=1)
    model.set_attn_implementation(attention)
    packed = PackedCollator(PAD)([rows[:3], rows[3:4], rows[4:]])
    alone = [answer_loss(model, SFTCollator(PAD)([row])) for row in rows]
    together = answer_loss(model, packed)
    assert trained_tokens(packed) == sum(row["length"] - 3 for row in rows)
    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=IN_A_ROW, atol=0)
    pairs = zip(_gradients(model, together), _gradients(model, sum(alone)), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=GRADIENTS, atol=LOGITS)


@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_are_proved_apart(name):
    model = MODELS[name]()
    before = model.training
    prove_packing(model, CPU)
    assert model.training == before


def test_a_model_that_sees_neighbours_is_refused(monkeypatch):
    monkeypatch.setattr(packing, "packed_mask", lambda p: torch.ones(1, 1, 16, 16).tril().bool())
    with pytest.raises(UserError, match="depend on a sequence's neighbours"):
        prove_packing(tiny_llama(), CPU)


def test_positions_that_run_on_are_refused(monkeypatch):
    def running_on(model, input_ids, position_ids):
        positions = torch.arange(input_ids.shape[1])[None]
        return {
            "input_ids": input_ids,
            "attention_mask": packed_mask(position_ids),
            "position_ids": positions,
        }

    monkeypatch.setattr(packing, "packed_inputs", running_on)
    with pytest.raises(UserError, match="depend on a sequence's neighbours"):
        prove_packing(tiny_gpt2(), CPU)


def test_a_query_sees_its_own_sequence_up_to_itself():
    mask = packed_mask(torch.tensor([[0, 1, 0, 1, 0, 0]]))  # two sequences, two of padding
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
LLAMA_LIKE = {**SMALL, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BloomConfig(**SMALL, n_layer=2), "takes no position_ids"),
        (MistralConfig(**LLAMA_LIKE, sliding_window=16), "has sliding_window 16"),
        (LlamaConfig(**LLAMA_LIKE, attn_implementation="flex_attention"), "uses flex_attention"),
        (MistralConfig(**LLAMA_LIKE, sliding_window=32), None),
        (LlamaConfig(**LLAMA_LIKE), None),
        (GPTNeoXConfig(**SMALL, intermediate_size=48, num_hidden_layers=2), None),
    ],
    ids=["alibi", "window", "flex", "wide-window", "llama", "neox"],
)
def test_what_cannot_be_packed_is_refused(config, words, monkeypatch):
    monkeypatch.setattr(packing, "load_config", lambda name, **_: config)
    if words is None:
        check_packing("model", 32)
    else:
        with pytest.raises(UserError, match=f"packing: model model {words}.*drop packing"):
            check_packing("model", 32)


def test_packs_in_tensors_by_hand():
    first = {"input_ids": [5, 6, 7], "trained": [1, 3], "length": 3, "real": True}
    second = {"input_ids": [8, 9], "trained": [0, 2], "length": 2, "real": True}
    third = {"input_ids": [4, 4, 4], "trained": [2, 3], "length": 3, "real": True}
    batch = PackedCollator(PAD)([[first, second], [third]])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 4, 4, PAD, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]
    # Nothing stands before the first token of a sequence that could predict it.
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 0, 1], [0, 0, 1, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.sequences == 3
    filler = PackedCollator(PAD)([[{**first, "real": False}]])
    assert not filler.real.any() and not filler.loss_mask.any() and filler.sequences == 0
