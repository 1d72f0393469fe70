"""Adapter folders that we write, read by PEFT, by transformers and by us."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.utils.module.adapter_write import _exactly
from dschat.utils.module.lora import lora_layers
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers.adapters import (
    ALONE,
    ARCHITECTURES,
    assert_equal,
    logits_of,
    options,
    plan,
    save_base,
    scores_of,
    with_adapter,
)
from tests.helpers.rounding import DIFFERENT

CAUSAL = {
    "llama": ("plain", "rslora", "dora", "random B", "embedding", "dora embedding", "whole"),
    "llama-tied": ("embedding", "dora embedding", "whole embedding"),
    "gpt2": ("plain", "dora", "dora embedding", "whole embedding"),
    "opt": ("rslora", "embedding", "whole embedding"),
}
REWARD = {
    "llama": ("plain", "whole embedding"),
    "llama-tied": ("dora embedding",),
    "gpt2": ("rslora", "embedding"),
    "opt": ("dora",),
}


def cases(kinds: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(name, kind) for name in kinds for kind in kinds[name]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_base(folder / name, name) for name in ARCHITECTURES}


def peft_model(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """As PEFT loads it, which must take every key and warn about nothing but a tied embedding."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    of_peft = [str(w.message) for w in caught if not issubclass(w.category, FutureWarning)]
    expected = "a tied layer is part of the adapter" if not config["modules_to_save"] else "none"
    assert [text for text in of_peft if expected not in text] == []
    stored = load_file(adapter / "adapter_model.safetensors")
    assert set_peft_model_state_dict(model, stored).unexpected_keys == []
    assert stored.keys() == get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    return model.eval()


def is_lora(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer)


@pytest.mark.parametrize(("name", "kind"), cases(CAUSAL))
def test_causal_adapter_computes_the_same_everywhere(
    tmp_path: Path, tiny_tokenizer, bases: dict[str, str], name: str, kind: str
):
    base, out = bases[name], tmp_path / "out"
    lora = LoraConfig(lora_dim=4, **options(kind, name))
    model = with_adapter(create_hf_model(base, tiny_tokenizer, torch.float32), lora)
    expected = logits_of(model)
    save_hf_format(model, tiny_tokenizer, out, ALONE, plan("both", base, lora, out))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert not torch.allclose(logits_of(plain), expected, atol=DIFFERENT)
    theirs = peft_model(plain, out / "adapter")
    assert_equal(logits_of(theirs), expected)
    adapted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if is_lora(m)}
    assert adapted == lora_layers(model).keys()
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    assert_equal(logits_of(merged), expected)
    parted = kind in ("embedding", "dora embedding")  # an adapter on one of two tied weights
    tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (name != "llama" and not parted)
    for folder in (out, out / "adapter"):
        ours = create_hf_model(str(folder), tiny_tokenizer, torch.float32).eval()
        assert_equal(logits_of(ours), expected)


@pytest.mark.parametrize(("name", "kind"), cases(REWARD))
def test_reward_adapter_scores_the_same_everywhere(
    tmp_path: Path, tiny_tokenizer, bases: dict[str, str], name: str, kind: str
):
    """Before saving, from the adapter's folder, merged, and in PEFT: the trained head included."""
    base, out = bases[name], tmp_path / "out"
    lora = LoraConfig(lora_dim=4, **options(kind, name))
    model = create_critic_model(base, tiny_tokenizer, torch.float32, init_head=True)
    model = with_adapter(model, lora)
    expected = scores_of(model)
    save_hf_format(model, tiny_tokenizer, out, ALONE, plan("both", base, lora, out))
    for folder in (out, out / "adapter"):
        ours = create_critic_model(str(folder), tiny_tokenizer, torch.float32).eval()
        assert_equal(scores_of(ours), expected)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain.config.pad_token_id = tiny_tokenizer.pad_token_id
    theirs = peft_model(plain, out / "adapter")
    assert_equal(logits_of(theirs)[:, 0], expected)


def test_folder_says_all_that_training_chose(tmp_path: Path, tiny_tokenizer, bases: dict[str, str]):
    base, out = bases["gpt2"], tmp_path / "out"
    choices = {"lora_alpha": 2.5, "lora_dropout": 0.1, "lora_init": "B", "use_rslora": True}
    lora = LoraConfig(
        lora_dim=4, lora_module_name=("c_attn",), modules_to_save=("ln_f",), **choices
    )
    model = with_adapter(create_hf_model(base, tiny_tokenizer, torch.float32), lora)
    model.generation_config.max_new_tokens = 5
    save_hf_format(model, tiny_tokenizer, out, ALONE, plan("adapter", base, lora, out))
    assert json.loads((out / "adapter_config.json").read_text()) == {
        "auto_mapping": {
            "base_model_class": "GPT2LMHeadModel",
            "lora_init": "B",
            "parent_library": "transformers.models.gpt2.modeling_gpt2",
        },
        "base_model_name_or_path": base,
        "bias": "none",
        "ensure_weight_tying": False,
        "fan_in_fan_out": True,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 2.5,
        "lora_dropout": 0.1,
        "modules_to_save": ["transformer.ln_f"],
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"],
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": True,
    }
    names = {file.name for file in out.iterdir()}
    assert not names & {"config.json", "model.safetensors", "adapter"}
    assert {"adapter_model.safetensors", "generation_config.json", "tokenizer.json"} <= names
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny_tokenizer.chat_template
    again = create_hf_model(str(out), tiny_tokenizer, torch.float32).eval()
    assert again.generation_config.max_new_tokens == 5
    assert_equal(logits_of(again), logits_of(model))


def test_reward_adapter_names_its_task_and_head(tmp_path: Path, tiny_tokenizer, bases):
    out, lora = tmp_path / "out", LoraConfig(lora_dim=4, lora_alpha=8.0)
    model = create_critic_model(bases["opt"], tiny_tokenizer, torch.float32, init_head=True)
    with_adapter(model, lora).keep_reward_head()  # the critic's own copy stays in memory
    save_hf_format(model, tiny_tokenizer, out, ALONE, plan("adapter", bases["opt"], lora, out))
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert config["lora_alpha"] == 8 and isinstance(config["lora_alpha"], int)
    assert config["auto_mapping"]["base_model_class"] == "OPTForSequenceClassification"
    assert "model.decoder.layers.0.fc1" in config["target_modules"]


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("kind", ["plain", "embedding", "whole embedding"])
def test_grown_vocabulary_comes_back(tmp_path: Path, name: str, kind: str):
    """The added rows are random, so the adapter carries the tables; PEFT reads them as its own."""
    base, out = save_base(tmp_path / "base", name), tmp_path / "out"
    tokenizer = load_hf_tokenizer(base)
    tokenizer.add_tokens([f"<{number}>" for number in range(9)])
    lora = LoraConfig(lora_dim=4, **options(kind, "llama"))
    model = with_adapter(create_hf_model(base, tokenizer, torch.float32), lora)
    assert model.config.vocab_size == 272
    save_hf_format(model, tokenizer, out, ALONE, plan("adapter", base, lora, out))
    torch.manual_seed(99)
    ours = create_hf_model(str(out), load_hf_tokenizer(str(out)), torch.float32).eval()
    assert_equal(logits_of(ours), logits_of(model))
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(272)
    theirs = PeftModel.from_pretrained(plain, out).eval()
    assert_equal(logits_of(theirs), logits_of(model))
    critic = create_critic_model(str(out), tokenizer, torch.float32, init_head=True)
    table = critic.rwtransformer.get_input_embeddings().weight
    assert torch.equal(table, ours.get_input_embeddings().weight)


def test_grown_reward_model_comes_back(tmp_path: Path):
    base, out = save_base(tmp_path / "base", "llama"), tmp_path / "out"
    tokenizer = load_hf_tokenizer(base)
    tokenizer.add_tokens([f"<{number}>" for number in range(9)])
    lora = LoraConfig(lora_dim=4)
    model = create_critic_model(base, tokenizer, torch.float32, init_head=True)
    with_adapter(model, lora)
    save_hf_format(model, tokenizer, out, ALONE, plan("adapter", base, lora, out))
    ours = create_critic_model(str(out), tokenizer, torch.float32).eval()
    assert_equal(scores_of(ours), scores_of(model))
    assert torch.equal(
        ours.rwtransformer.embed_tokens.weight, model.rwtransformer.embed_tokens.weight
    )


def test_names_that_are_ends_of_others_become_a_pattern():
    names, pattern = ["layer.q", "q"], r"layer\.q|q"
    assert _exactly(names, ["layer.k"]) == names
    assert _exactly(["q"], ["layer.k", "layer.q"]) == "q"
    assert _exactly(names, ["other.layer.q"]) == pattern
