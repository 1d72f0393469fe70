"""Adapter folders under ZeRO-3 on two ranks: merged while loading shards, saved from shards."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers.adapters import (
    ALONE,
    assert_equal,
    logits_of,
    options,
    plan,
    save_base,
    with_adapter,
)
from tests.helpers.launch import run_ranks
from tests.helpers.rounding import DIFFERENT
from tests.helpers.tiny import byte_tokenizer

WORKER = Path(__file__).with_name("adapter_worker.py")
# A tied embedding that parts, one that stays tied, both with more tokens than the base; DoRA.
CAUSAL = ("dora embedding", "whole embedding", "dora")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    made, output = (tmp_path_factory.mktemp(name) for name in ("made", "output"))
    base, tokenizer = save_base(made / "base", "llama-tied"), byte_tokenizer()
    alike = create_hf_model(base, tokenizer, torch.float32)
    with torch.no_grad():
        alike.model.embed_tokens.weight[100:110] = 2 * alike.model.embed_tokens.weight[3]
    save_hf_format(alike, tokenizer, made / "alike", ALONE)
    tokenizer.add_tokens([f"<{number}>" for number in range(9)])
    for kind in (*CAUSAL, "reward"):
        is_reward = kind == "reward"
        lora = LoraConfig(lora_dim=4, **options("embedding" if is_reward else kind, "llama"))
        load = {"init_head": True} if is_reward else {}
        create = create_critic_model if is_reward else create_hf_model
        model = with_adapter(create(base, tokenizer, torch.float32, **load), lora)
        out = made / f"adapter-{kind.replace(' ', '-')}"
        save_hf_format(model, tokenizer, out, ALONE, plan("adapter", base, lora, out))
    shutil.copytree(made / "adapter-dora", made / "misfit")
    tensors = load_file(made / "misfit/adapter_model.safetensors")
    first = next(key for key in tensors if "lora_A" in key)
    save_file(tensors | {first: torch.ones(4, 3)}, made / "misfit/adapter_model.safetensors")
    printed = run_ranks(WORKER, 2, [str(made), str(output)], made)
    return SimpleNamespace(made=made, output=output, printed=printed)


@pytest.mark.parametrize("name", ["dora-embedding", "whole-embedding", "dora", "reward"])
def test_shards_hold_what_one_process_loads(run: SimpleNamespace, name: str):
    folder = str(run.made / f"adapter-{name}")
    create = create_critic_model if name == "reward" else create_hf_model
    ours = create(folder, load_hf_tokenizer(folder), torch.float32).state_dict()
    sharded = torch.load(run.output / f"adapter-{name}.pt")
    assert {key for key in sharded if "lora_" not in key} == ours.keys()
    for key, tensor in ours.items():
        assert_equal(sharded[key], tensor)
    if name != "reward":
        parted = not torch.equal(ours["lm_head.weight"], ours["model.embed_tokens.weight"])
        assert parted == (name == "dora-embedding")


def test_an_adapter_that_does_not_fit_stops_every_rank(run: SimpleNamespace):
    for text in run.printed:
        assert "refused: adapter " in text and "does not fit" in text


def test_untrained_rows_are_found_in_shards(run: SimpleNamespace):
    for text in run.printed:
        assert "untrained: {3: 'its row of model.embed_tokens is like 10 others'}" in text


def test_adapters_saved_from_shards_are_whole(run: SimpleNamespace):
    """The adapter alone, the adapter beside merged weights, and these, are one model."""
    tokenizer = byte_tokenizer()
    folders = [run.output / name for name in ("both", "both/adapter", "adapter")]
    logits = [
        logits_of(create_hf_model(str(folder), tokenizer, torch.float32).eval())
        for folder in folders
    ]
    assert_equal(logits[1], logits[0])
    assert_equal(logits[2], logits[0])
    base = create_hf_model(str(run.made / "base"), tokenizer, torch.float32).eval()
    assert not torch.allclose(logits_of(base), logits[0], atol=DIFFERENT)
