"""Implementations of attention: chosen, refused, and flash attention's bounds of packed rows."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations import flash_attention

from dschat.data.collators import PackedCollator, SFTCollator
from dschat.errors import UserError
from dschat.models.attention import IMPLEMENTATIONS
from dschat.models.causal_lm import create_hf_model
from dschat.models.config import check_attention
from dschat.models.packing import prove_packing
from dschat.models.reward_model import create_critic_model
from dschat.train.evaluation import answer_loss
from tests.helpers import tiny
from tests.helpers.rounding import IN_A_ROW


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_llama_folder(tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_both_kinds_of_models_take_the_chosen_attention(name, folder):
    tokenizer = tiny.byte_tokenizer()
    check_attention(name, "fp32", folder)
    model = create_hf_model(folder, tokenizer, torch.float32, attn_implementation=name)
    assert model.config._attn_implementation == name
    critic = create_critic_model(
        folder, tokenizer, torch.float32, attn_implementation=name, init_head=True
    )
    assert critic.rwtransformer.config._attn_implementation == name


def test_what_is_not_there_is_refused(folder, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(
        UserError, match=r"^attn_implementation flash_attention_2: needs flash-attn"
    ):
        check_attention("flash_attention_2", "bf16", folder)
    with pytest.raises(UserError, match="computes in bf16 or fp16, the run in fp32"):
        check_attention("flash_attention_2", "fp32", folder)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    check_attention("flash_attention_2", "bf16", folder)


def test_a_model_without_such_attention_is_refused(tmp_path: Path):
    from transformers import BloomConfig

    BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, n_layer=1, n_head=4).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match=r"\(bloom\) has none; choose one of eager"):
        check_attention("flex_attention", "fp32", str(tmp_path))


def test_transformers_knows_every_name():
    known = {"eager", *flash_attention_names()}
    assert set(IMPLEMENTATIONS) <= known


def flash_attention_names() -> list[str]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return list(ALL_ATTENTION_FUNCTIONS.valid_keys())


def varlen(query, key, value, attention_mask, *, query_length, is_causal, softmax_scale, **kwargs):
    """Flash attention's sum over the sequences whose bounds arrive, one by one: (B, T, H, D)."""
    assert attention_mask is None and is_causal and query_length == query.shape[1]
    bounds = kwargs["cu_seq_lens_q"].tolist()
    assert (
        bounds == kwargs["cu_seq_lens_k"].tolist() and kwargs["cu_seq_lens_q"].dtype == torch.int32
    )
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    assert max(lengths) == kwargs["max_length_q"] == kwargs["max_length_k"]
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))  # (B * T, H, D)
    sequences = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    outputs = []
    for parts in sequences:
        q, k, v = (part.transpose(0, 1) for part in parts)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True
        )
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs).view(-1, query_length, *query.shape[1:])


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_flash_attention_gets_the_bounds_of_packed_sequences(name, monkeypatch):
    rows = [
        {"input_ids": ids, "trained": [3, len(ids)], "length": len(ids)}
        for ids in tiny.token_rows(5, seed=1)
    ]
    model = tiny.ARCHITECTURES[name]()
    alone = [answer_loss(model, SFTCollator(tiny.PAD)([row])) for row in rows]
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", varlen)
    model.config._attn_implementation = "flash_attention_2"
    prove_packing(model, torch.device("cpu"))
    packed = PackedCollator(tiny.PAD)([rows[:3], rows[3:]])
    together = answer_loss(model, packed)
    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=IN_A_ROW, atol=0)
