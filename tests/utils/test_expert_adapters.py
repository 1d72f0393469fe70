"""Adapters on experts in PEFT's format (`target_parameters`): ours in PEFT, PEFT's here."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dschat.errors import UserError
from dschat.merge import merge
from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.rlhf.one_trunk import OneTrunk, check_one_trunk
from dschat.utils.module.lora import adapters_disabled, fused_adapters, merged_state_dict
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers.adapters import (
    ALONE,
    as_trained,
    assert_equal,
    logits_of,
    plan,
    scores_of,
    with_adapter,
)
from tests.helpers.rounding import DIFFERENT, LOGITS
from tests.helpers.tiny import byte_tokenizer, tiny_moe

OURS = {
    "mixtral": {"lora_alpha": 6.0},
    "qwen3_moe": {"use_rslora": True, "lora_alpha": 4.0},
    "gpt_oss": {"lora_init": "B"},
    "olmoe": {"lora_module_name": ("down_proj", "q_proj")},
    "qwen2_moe": {},  # layers beside the experts that PEFT would take for theirs
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
THEIRS = {  # PEFT's all-linear gives Mixtral's and Qwen's gate_up_proj twice the rank
    "mixtral": {"target_modules": "all-linear", "lora_alpha": 4},
    "qwen3_moe": {"target_modules": "all-linear", "use_rslora": True},
    "gpt_oss": {"target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "router.weight"]},
    "olmoe": {
        "target_modules": [],
        "target_parameters": ["gate_up_proj", "0.mlp.experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 9},
    },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    for name in OURS:
        tiny_moe(name).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in OURS}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS)


def loaded_by_peft(base: torch.nn.Module, folder: Path) -> PeftModel:
    """Every key taken, no warning; what Python says of other tests' files, it may say here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder).eval()
    others = FutureWarning, ResourceWarning
    assert [str(w.message) for w in caught if not issubclass(w.category, others)] == []
    stored = load_file(folder / "adapter_model.safetensors")
    assert stored.keys() == get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    return model


def make(model: torch.nn.Module, folder: Path, **options: object) -> PeftModel:
    """A PEFT model with its adapters moved, saved into the folder."""
    made = get_peft_model(model, PeftConfig(**{"r": 3, "task_type": "CAUSAL_LM", **options}))
    as_trained(made, size=0.1).save_pretrained(folder)
    return made


@pytest.mark.parametrize("name", OURS)
def test_our_adapter_computes_the_same_in_peft(tmp_path: Path, tiny_tokenizer, bases, name: str):
    base, out = bases[name], tmp_path / "out"
    lora = LoraConfig(lora_dim=3, **OURS[name])
    model = with_adapter(create_hf_model(base, tiny_tokenizer, torch.float32), lora)
    expected = logits_of(model)
    save_hf_format(model, tiny_tokenizer, out, ALONE, plan("both", base, lora, out))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert not torch.allclose(logits_of(plain), expected, atol=DIFFERENT)
    close(logits_of(loaded_by_peft(plain, out / "adapter")), expected)
    for folder in (out, out / "adapter"):
        ours = create_hf_model(str(folder), tiny_tokenizer, torch.float32).eval()
        assert_equal(logits_of(ours), expected)


@pytest.mark.parametrize("name", THEIRS)
def test_peft_adapter_computes_the_same_here(tmp_path: Path, tiny_tokenizer, bases, name: str):
    folder = tmp_path / "adapter"
    theirs = make(AutoModelForCausalLM.from_pretrained(bases[name]), folder, **THEIRS[name])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_parameters"]
    plain = AutoModelForCausalLM.from_pretrained(bases[name]).eval()
    assert not torch.allclose(logits_of(theirs), logits_of(plain), atol=DIFFERENT)
    close(logits_of(create_hf_model(str(folder), tiny_tokenizer, torch.float32)), logits_of(theirs))
    merge(str(folder), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    close(logits_of(merged), logits_of(theirs))
    critic = create_critic_model(str(folder), tiny_tokenizer, torch.float32, init_head=True)
    hidden = theirs(torch.arange(3, 20)[None], output_hidden_states=True).hidden_states[-1]
    close(critic.rwtransformer.eval()(torch.arange(3, 20)[None])[0], hidden)


def test_reward_adapter_scores_the_same_both_ways(tmp_path: Path, tiny_tokenizer, bases):
    base, out, folder = bases["mixtral"], tmp_path / "out", tmp_path / "theirs"
    lora = LoraConfig(lora_dim=3)
    model = create_critic_model(base, tiny_tokenizer, torch.float32, init_head=True)
    expected = scores_of(with_adapter(model, lora))
    save_hf_format(model, tiny_tokenizer, out, ALONE, plan("both", base, lora, out))
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain.config.pad_token_id = tiny_tokenizer.pad_token_id
    close(logits_of(loaded_by_peft(plain, out / "adapter"))[:, 0], expected)
    for saved in (out, out / "adapter"):
        ours = create_critic_model(str(saved), tiny_tokenizer, torch.float32).eval()
        assert_equal(scores_of(ours), expected)
    other = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    other.config.pad_token_id = tiny_tokenizer.pad_token_id
    options = {"target_modules": "all-linear", "task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    theirs = make(other, folder, **options)
    ours = create_critic_model(str(folder), tiny_tokenizer, torch.float32).eval()
    close(scores_of(ours), logits_of(theirs)[:, 0])


def test_what_does_not_fit_is_named(tmp_path: Path, tiny_tokenizer, bases):
    folder, file = tmp_path / "adapter", tmp_path / "adapter/adapter_model.safetensors"
    options = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    make(AutoModelForCausalLM.from_pretrained(bases["olmoe"]), folder, **options)
    tensors = load_file(file)
    inner = "model.layers.1.mlp.experts.base_layer"
    faults = {
        f"missing {inner}.lora_A": lambda t: {k: v for k, v in t.items() if inner not in k},
        "experts.gate_up_proj of rank 10, adapter_config.json says 3": lambda t: {
            k: v[:10] if f"{inner}.lora_A" in k else v for k, v in t.items()
        },
        "experts.gate_up_proj does not fit": lambda t: {
            k: v[1:].contiguous() if f"{inner}.lora_B" in k else v for k, v in t.items()
        },
        "q_proj of rank 2, adapter_config.json says 3": lambda t: {
            k: v[:2] if "q_proj.lora_A" in k else v for k, v in t.items()
        },
    }
    for words, change in faults.items():
        save_file(change(tensors), file)
        with pytest.raises(UserError, match=words):
            create_hf_model(str(folder), tiny_tokenizer, torch.float32)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe"])
def test_adapters_on_one_trunk_stay_apart(tmp_path: Path, tiny_tokenizer, bases, name: str):
    """Unmerged on shared weights, each tree computes its folder's model, also with adapters on."""
    base = bases[name]
    for seed, folder in enumerate(("one", "two"), start=1):
        lora = LoraConfig(lora_dim=3)
        model = with_adapter(create_hf_model(base, tiny_tokenizer, torch.float32), lora, seed)
        plain = plan("adapter", base, lora, tmp_path / folder)
        save_hf_format(model, tiny_tokenizer, tmp_path / folder, ALONE, plain)
    names = [str(tmp_path / "one"), str(tmp_path / "two")]
    check_one_trunk(names)
    trunk = OneTrunk(names[0], tiny_tokenizer, torch.float32)
    trees = [trunk.language_model(folder, {}).eval() for folder in names]
    merged = [create_hf_model(folder, tiny_tokenizer, torch.float32).eval() for folder in names]
    weights = [{id(p) for n, p in tree.named_parameters() if "experts." in n} for tree in trees]
    assert len(weights[0] & weights[1]) >= 2  # the experts themselves
    more = LoraConfig(lora_dim=2, lora_init="B")
    for model, seed in ((trees[0], 5), (merged[0], 5), (trees[1], 6), (merged[1], 6)):
        model.eval()
        start = logits_of(model)
        torch.manual_seed(seed)
        with_adapter(model, more, seed)
        with adapters_disabled(model):
            assert torch.equal(logits_of(model), start)
    for tree, other in zip(trees, merged, strict=True):
        expected = logits_of(other)
        assert_equal(logits_of(tree), expected)
        with fused_adapters(tree):
            assert_equal(logits_of(tree), expected, folded=True)
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
        plain.load_state_dict(merged_state_dict(tree.state_dict(), tree))
        assert_equal(logits_of(plain), expected)
