"""A mixture of experts through steps 1, 2 and 3: trained, saved, taken up, scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dschat.errors import UserError
from dschat.train.model_config import ModelConfig
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers import steps
from tests.helpers.rounding import LOGITS
from tests.helpers.tiny import byte_tokenizer, tiny_moe

COMMON = [
    "--data_path",
    "rows.jsonl",
    "--data_output_path",
    "cache",
    "--dtype",
    "fp32",
    "--seed",
    "7",
    "--deepspeed_config",
    "adam.json",
]
SHORT = [*COMMON, "--max_seq_len", "96", "--lora_dim", "4", "--learning_rate", "1e-3"]
ROLES = ["--actor_model_name_or_path", "sft", "--critic_model_name_or_path", "reward"]
SIZES = ["--max_prompt_seq_len", "64", "--max_answer_seq_len", "6"]
SIZES += ["--per_device_generation_batch_size", "4", "--per_device_training_batch_size", "4"]
PPO = [*COMMON, *ROLES, *SIZES, "--actor_lora_dim", "4", "--critic_lora_dim", "4"]
PPO += ["--reward_scaling", "none"]
PPO += ["--rollout_engine", "generate"]  # one sampler for all: at ZeRO-3 there is no other
ONE_BASE = ["--actor_model_name_or_path", "base"]
ONE_BASE += ["--critic_model_name_or_path", "reward/adapter"]
PLAN = {
    "sft": [steps.SFT, *SHORT, "--model_name_or_path", "base", "--gradient_checkpointing"],
    "reward": [steps.REWARD, *SHORT, "--model_name_or_path", "base", "--zero_stage", "2"],
    "fused": [steps.PPO, *PPO, "--fuse_lora_for_generation"],
    "copies": [steps.PPO, *PPO, "--share_trunk", "none"],
    "shards": [steps.PPO, *PPO, "--actor_zero_stage", "3", "--critic_zero_stage", "3"],
    "two": [steps.PPO, *PPO, *ONE_BASE],
    "one": [steps.PPO, *PPO, *ONE_BASE, "--share_trunk", "all"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> steps.Run:
    folder = tmp_path_factory.mktemp("experts")
    tiny_moe("mixtral", max_position_embeddings=128).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    steps.write_optimizer(folder)
    steps.write_rows(folder / "rows.jsonl", steps.preference_rows(16, seed=0))
    plan = [[*words, "--output_dir", name] for name, words in PLAN.items()]
    return steps.Run(folder, *steps.run_worker(plan, folder, ranks=1))


@pytest.mark.slow
def test_every_step_ends_well(run: steps.Run):
    assert [r.code for r in run.results] == [0] * len(PLAN), [r.stderr[-999:] for r in run.results]
    assert "without adapters" not in run.printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "fused/actor", "shards/actor"])
def test_experts_have_moved_in_what_is_saved(run: steps.Run, name: str):
    start = run.folder / ("base" if name == "sft" else "sft")
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (start, run.folder / name))
    old = before.state_dict()
    moved = {n for n, tensor in after.state_dict().items() if not torch.equal(tensor, old[n])}
    for leaf in ("experts.gate_up_proj", "experts.down_proj", "gate.weight", "q_proj.weight"):
        assert any(n.endswith(leaf) for n in moved), leaf
    adapter = load_file(run.folder / "sft/adapter/adapter_model.safetensors")
    assert any(key.endswith("mlp.experts.base_layer.lora_B.weight") for key in adapter)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("fused", "copies", "shards"), ("two", "one")])
def test_ways_to_hold_the_roles_agree(run: steps.Run, names: tuple[str, ...]):
    """Adapters off, frozen copies, adapters that stay apart on one trunk: the same figures."""
    files = [run.folder / name / "metrics.jsonl" for name in names]
    figures = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for key in ("reward", "kl", "entropy"):
        first, *others = ([row[key] for row in rows if key in row] for rows in figures)
        assert len(first) > 2
        for other in others:
            assert other == pytest.approx(first, abs=LOGITS), key


def test_a_rank_above_every_matrix_is_refused(tmp_path: Path):
    tiny_moe("mixtral").save_pretrained(tmp_path)
    lora = {"lora_dim": 32, "lora_module_name": ("experts",)}
    ModelConfig(lora=LoraConfig(**lora)).check(str(tmp_path), AutoModelForCausalLM.from_config)
    lora["lora_module_name"] = ("down_proj",)
    with pytest.raises(UserError, match=r"rank above 24 \(.*experts.down_proj\)"):
        ModelConfig(lora=LoraConfig(**lora)).check(str(tmp_path), AutoModelForCausalLM.from_config)
