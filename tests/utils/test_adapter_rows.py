"""Rows of single tokens in adapter folders: ours in PEFT, PEFT's here."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
)

from dschat.errors import UserError
from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.rlhf.one_trunk import check_one_trunk
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.utils.module.lora import convert_linear_layer_to_lora, only_optimize_lora_parameters
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.token_tables import add_token_rows
from tests.helpers import tiny
from tests.helpers.adapters import (
    ALONE,
    as_trained,
    assert_equal,
    logits_of,
    plan,
    save_base,
    scores_of,
)
from tests.helpers.tiers import tiers

TOKENS, LORA = [2, 40, 7], LoraConfig(lora_dim=4)
NAMES = ("llama", "llama-tied", "gpt2", "opt")
EMBEDDING = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}
EMBEDDING |= {"llama-tied": "model.embed_tokens", "opt": "model.decoder.embed_tokens"}


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """Adapters and rows on it, moved."""
    add_token_rows(convert_linear_layer_to_lora(model, LORA), TOKENS)
    return as_trained(only_optimize_lora_parameters(model))


def in_peft(base: torch.nn.Module, adapter: Path) -> PeftModel:
    """As PEFT loads it: every key, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(base, adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert set_peft_model_state_dict(model, stored).unexpected_keys == []
    own = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    assert {key for key in stored if "base_layer" not in key} == own
    return model.eval()


@pytest.mark.parametrize("more", tiers([0, 9], [9]))
@pytest.mark.parametrize("name", tiers(NAMES, ["llama", "llama-tied"]))
def test_our_rows_compute_the_same_everywhere(tmp_path: Path, name: str, more: int):
    """Live, merged, from the adapter alone, and in PEFT; also with more tokens than the base."""
    base, out = save_base(tmp_path / "base", name), tmp_path / "out"
    tokenizer = load_hf_tokenizer(base)
    tokenizer.add_tokens([f"<{number}>" for number in range(more)])
    model = trained(create_hf_model(base, tokenizer, torch.float32))
    expected = logits_of(model)
    save_hf_format(model, tokenizer, out, ALONE, plan("both", base, LORA, out))
    for folder in (out, out / "adapter"):
        ours = create_hf_model(str(folder), tokenizer, torch.float32).eval()
        assert_equal(logits_of(ours), expected)
        assert ours.config.tie_word_embeddings == (name != "llama")
    assert_equal(logits_of(AutoModelForCausalLM.from_pretrained(out).eval()), expected)
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(tiny.VOCABULARY + 8 * bool(more), mean_resizing=False)
    assert_equal(logits_of(in_peft(plain, out / "adapter")), expected)
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    tables = [EMBEDDING[name], *(["lm_head"] if name == "llama" else [])]
    assert config["trainable_token_indices"] == dict.fromkeys(tables, sorted(TOKENS))
    merged = load_file(out / "model.safetensors")[f"{EMBEDDING[name]}.weight"]
    rows = load_file(out / "adapter/adapter_model.safetensors")[
        f"base_model.model.{EMBEDDING[name]}.token_adapter.trainable_tokens_delta"
    ]
    assert torch.equal(rows, merged[sorted(TOKENS)])  # PEFT's "delta" is the row itself
    table = model.get_input_embeddings().weight
    others = [i for i in range(len(table)) if i not in TOKENS]
    assert torch.equal(merged[others], table[others])


@pytest.mark.parametrize("name", tiers(NAMES, ["llama-tied"]))
def test_a_reward_models_rows_score_the_same_everywhere(tmp_path: Path, tiny_tokenizer, name: str):
    base, out = save_base(tmp_path / "base", name), tmp_path / "out"
    model = trained(create_critic_model(base, tiny_tokenizer, torch.float32, init_head=True))
    expected = scores_of(model)
    save_hf_format(model, tiny_tokenizer, out, ALONE, plan("both", base, LORA, out))
    for folder in (out, out / "adapter"):
        ours = create_critic_model(str(folder), tiny_tokenizer, torch.float32).eval()
        assert_equal(scores_of(ours), expected)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain.config.pad_token_id = tiny.PAD
    assert_equal(logits_of(in_peft(plain, out / "adapter"))[:, 0], expected)


def test_rows_of_bf16_are_summed_in_fp32_and_cast_once(tmp_path: Path, tiny_tokenizer):
    base, out = save_base(tmp_path / "base", "llama"), tmp_path / "out"
    model = trained(create_hf_model(base, tiny_tokenizer, torch.bfloat16))
    save_hf_format(model, tiny_tokenizer, out, ALONE, plan("both", base, LORA, out))
    head, at = model.lm_head, sorted(TOKENS)
    expected = (head.weight[at].double() + head.lora_token_rows.double()).bfloat16()
    assert torch.equal(load_file(out / "model.safetensors")["lm_head.weight"][at], expected)
    again = create_hf_model(str(out / "adapter"), tiny_tokenizer, torch.bfloat16)
    assert torch.equal(again.lm_head.weight[at], expected)


PEFTS = {  # of llama or, with `tied`, of llama-tied; "parted": head and embedding end as two
    "list": [2, 5, 7],
    "names": {"embed_tokens": [2, 5], "lm_head": [7, 2]},
    "embedding alone": {"model.embed_tokens": [5]},
    "tied: list": [2, 5, 7],
    "tied: same": {"embed_tokens": [2, 5], "lm_head": [2, 5]},
    "tied: parted": {"embed_tokens": [2, 5], "lm_head": [2, 7]},
    "tied: parted head": {"lm_head": [2, 7]},
}


@pytest.mark.parametrize("more", tiers([0, 8], [8]))
@pytest.mark.parametrize("kind", tiers(PEFTS, ["names", "tied: list", "tied: parted"]))
def test_rows_that_peft_trained(tmp_path: Path, tiny_tokenizer, kind: str, more: int):
    tied, folder = kind.startswith("tied"), tmp_path / "adapter"
    base = save_base(tmp_path / "base", "llama-tied" if tied else "llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    if more:
        model.resize_token_embeddings(tiny.VOCABULARY + more, mean_resizing=False)
    options = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(
            model, PeftConfig(r=4, trainable_token_indices=PEFTS[kind], **options)
        )
        as_trained(made, size=0.1).save_pretrained(folder)
    ours = create_hf_model(str(folder), tiny_tokenizer, torch.float32).eval()
    assert_equal(logits_of(ours), logits_of(made))
    assert ours.config.tie_word_embeddings == (tied and "parted" not in kind)
    critic = create_critic_model(str(folder), tiny_tokenizer, torch.float32, init_head=True)
    table = critic.rwtransformer.embed_tokens.weight
    assert torch.equal(table, ours.model.embed_tokens.weight)
    save_hf_format(ours, tiny_tokenizer, tmp_path / "merged", ALONE)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_equal(logits_of(again), logits_of(made))


ROWS = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("tensors", "indices", "reason"),
    [
        ({ROWS: None}, {"lm_head": [2, 7]}, "missing token_adapter.trainable_tokens_delta of lm_h"),
        (
            {ROWS: torch.ones(3, 32)},
            {"lm_head": [2, 7]},
            "rows (3, 32) of lm_head: 2 tokens are na",
        ),
        ({}, {"lm_head": [2, 264]}, "lm_head has 264 rows, fewer than a token's id"),
        ({}, {"lm_head": [2, -1]}, "lm_head has 264 rows, fewer than a token's id"),
        ({}, {"head": [2, 7], "x": [3]}, "missing token_adapter.trainable_tokens_delta of x"),
        ({}, None, f"unexpected {ROWS}"),
        ({}, {"lm_head": "much"}, "adapter_config.json is malformed"),
        (
            {ROWS: None, ROWS.replace("lm_head", "model.norm"): torch.ones(2, 32)},
            {"norm": [2, 7]},
            "no table model.norm for rows of tokens",
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(
    tmp_path: Path, tiny_tokenizer, tensors: dict, indices: object, reason: str
):
    base, out = save_base(tmp_path / "base", "llama"), tmp_path / "out"
    model = create_hf_model(base, tiny_tokenizer, torch.float32)
    convert_linear_layer_to_lora(model, LORA)
    add_token_rows(model, [2, 7], {"lm_head": model.lm_head})
    save_hf_format(model, tiny_tokenizer, out, ALONE, plan("adapter", base, LORA, out))
    path = out / "adapter_model.safetensors"
    state = {key: t for key, t in (load_file(path) | tensors).items() if t is not None}
    save_file(state, path)
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": indices}))
    with pytest.raises(UserError) as caught:
        create_hf_model(str(out), tiny_tokenizer, torch.float32)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_rows_beside_a_bias_that_peft_leaves_out_are_refused(tmp_path: Path, tiny_tokenizer):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = PhiForCausalLM(PhiConfig(vocab_size=264, num_attention_heads=4, **shape))
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    made = get_peft_model(
        model, PeftConfig(r=4, trainable_token_indices={"lm_head": [2]}, **options)
    )
    made.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="lm_head has a bias, which PEFT leaves out beside rows"):
        create_hf_model(str(tmp_path / "adapter"), tiny_tokenizer, torch.float32)


def test_one_trunk_is_refused_before_anything_loads(tmp_path: Path, tiny_tokenizer):
    base, out = save_base(tmp_path / "base", "llama"), tmp_path / "out"
    model = trained(create_hf_model(base, tiny_tokenizer, torch.float32))
    save_hf_format(model, tiny_tokenizer, out, ALONE, plan("adapter", base, LORA, out))
    with pytest.raises(UserError, match=r"share_trunk all: adapter .* rows of tokens"):
        check_one_trunk([str(out), base])
