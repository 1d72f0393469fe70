"""Adapter folders that PEFT writes, read by us."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from tests.helpers import tiny
from tests.helpers.adapters import (
    ALONE,
    ARCHITECTURES,
    LAST_NORM,
    as_trained,
    assert_equal,
    logits_of,
    save_base,
    scores_of,
)
from tests.helpers.rounding import DIFFERENT

LINEAR = {"target_modules": "all-linear"}
KINDS = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 6},
    "pattern": {"target_modules": r".*\.1\..*(up|down)_proj"},
    "rslora": {**LINEAR, "use_rslora": True, "lora_alpha": 3},
    "ranks": {**LINEAR, "rank_pattern": {"q_proj": 2, r".*1\.mlp.*": 6}, "lora_alpha": 3},
    "alphas": {**LINEAR, "alpha_pattern": {"layers.0.self_attn.k_proj": 9}},
    "dora": {**LINEAR, "use_dora": True},
    "gaussian": {**LINEAR, "init_lora_weights": "gaussian"},
    "whole": {**LINEAR, "modules_to_save": ["lm_head", "norm"]},
    "whole, tied": {**LINEAR, "modules_to_save": ["embed_tokens"]},
    "whole, kept tied": {
        **{**LINEAR, "modules_to_save": ["embed_tokens"]},
        "ensure_weight_tying": True,
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding, kept tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "dora embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "conv": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    "no task": {"target_modules": ["fc1"], "task_type": None},
}
CASES = {
    "llama": ("plain", "pattern", "rslora", "ranks", "alphas", "dora", "gaussian", "whole"),
    "llama-tied": (
        *("whole, tied", "whole, kept tied", "embedding", "embedding, kept tied"),
        *("dora embedding", "head"),
    ),
    "gpt2": ("conv",),
    "opt": ("no task", "embedding"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_base(folder / name, name) for name in ARCHITECTURES}


def make(model: torch.nn.Module, folder: Path, seed: int = 1, **options: object) -> PeftModel:
    """A PEFT model with all that trains moved, saved into the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(model, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))
        as_trained(made, seed, size=0.1).save_pretrained(folder)
    return made


@pytest.mark.parametrize(("name", "kind"), [(name, k) for name in CASES for k in CASES[name]])
def test_adapters_that_peft_made(
    tmp_path: Path, tiny_tokenizer, bases: dict[str, str], name: str, kind: str
):
    base, folder = bases[name], tmp_path / "adapter"
    theirs = make(AutoModelForCausalLM.from_pretrained(base), folder, **KINDS[kind])
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert not torch.allclose(logits_of(theirs), logits_of(plain), atol=DIFFERENT)
    ours = create_hf_model(str(folder), tiny_tokenizer, torch.float32).eval()
    assert_equal(logits_of(ours), logits_of(theirs))
    parted = kind in ("whole, tied", "embedding", "dora embedding", "head") and name != "llama"
    assert ours.config.tie_word_embeddings == (name != "llama" and not parted)
    save_hf_format(ours, tiny_tokenizer, tmp_path / "merged", ALONE)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_equal(logits_of(again), logits_of(theirs))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_reward_adapter_that_peft_made(
    tmp_path: Path, tiny_tokenizer, bases: dict[str, str], name: str, task: str | None
):
    model = AutoModelForSequenceClassification.from_pretrained(bases[name], num_labels=1)
    model.config.pad_token_id = tiny.PAD
    whole = ["score", LAST_NORM[name]]
    options = {**LINEAR, "modules_to_save": whole, "task_type": task}
    theirs = make(model, tmp_path / "adapter", **options)
    for init_head in (False, True):
        ours = create_critic_model(
            str(tmp_path / "adapter"), tiny_tokenizer, torch.float32, init_head=init_head
        )
        assert_equal(scores_of(ours.eval()), logits_of(theirs)[:, 0])


def test_adapter_in_a_bin_file(tmp_path: Path, tiny_tokenizer, bases: dict[str, str]):
    folder = tmp_path / "adapter"
    theirs = make(AutoModelForCausalLM.from_pretrained(bases["llama"]), folder, **LINEAR)
    stored = folder / "adapter_model.safetensors"
    torch.save(load_file(stored), folder / "adapter_model.bin")
    stored.unlink()
    ours = create_hf_model(str(folder), tiny_tokenizer, torch.float32).eval()
    assert_equal(logits_of(ours), logits_of(theirs))


def test_language_models_adapter_starts_a_reward_model(
    tmp_path: Path, tiny_tokenizer, bases: dict[str, str]
):
    """What it trained of the output head is left out, the trunk is what PEFT computes."""
    base, folder = bases["llama"], tmp_path / "adapter"
    options = {"target_modules": ["lm_head", "o_proj"], "modules_to_save": ["norm"]}
    theirs = make(AutoModelForCausalLM.from_pretrained(base), folder, **options)
    ours = create_critic_model(str(folder), tiny_tokenizer, torch.float32, init_head=True).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        hidden = theirs(ids, output_hidden_states=True).hidden_states[-1]
        assert_equal(ours.rwtransformer(ids)[0], hidden)


def test_adapters_on_adapters(tmp_path: Path, tiny_tokenizer, bases: dict[str, str]):
    """PEFT merges the first and trains a second one on it; here the folders alone say so."""
    first, second = tmp_path / "first", tmp_path / "second"
    model = make(AutoModelForCausalLM.from_pretrained(bases["opt"]), first, **LINEAR)
    theirs = make(model.merge_and_unload(), second, seed=2, target_modules=["fc1", "embed_tokens"])
    text = json.loads((second / "adapter_config.json").read_text())
    text["base_model_name_or_path"] = str(first)
    (second / "adapter_config.json").write_text(json.dumps(text))
    ours = create_hf_model(str(second), tiny_tokenizer, torch.float32).eval()
    assert_equal(logits_of(ours), logits_of(theirs))


def test_bf16_weights_are_summed_in_fp32_and_cast_once(tmp_path: Path, tiny_tokenizer, bases):
    base, folder = bases["gpt2"], tmp_path / "adapter"
    theirs = make(AutoModelForCausalLM.from_pretrained(base), folder, target_modules=["c_fc"])
    ours = create_hf_model(str(folder), tiny_tokenizer, torch.bfloat16)
    layer, name = theirs.base_model.model.transformer.h[1].mlp.c_fc, "h.1.mlp.c_fc.weight"
    weight = layer.get_base_layer().weight.bfloat16().float()
    expected = (weight + layer.get_delta_weight("default")).bfloat16()
    assert torch.equal(ours.transformer.get_parameter(name), expected)
