"""A whole iteration of PPO as it allocates, against the plan of its settings."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dschat.config import RLHFSettings
from dschat.data.batches import PromptBatch
from dschat.models.causal_lm import create_hf_model
from dschat.models.config import load_config
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.plan.counting import Allocations
from dschat.plan.memory import plan_memory
from dschat.plan.roles import GENERATION, SCORING, MemoryPlan
from dschat.plan.states import BUCKETS
from dschat.rlhf import ppo_trainer
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer
from dschat.rlhf.ppo_updates import Updates
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.utils.distributed import init_distributed
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers.adapters import ALONE, plan, with_adapter
from tests.helpers.tiny import byte_tokenizer, tiny_llama

ROWS, PROMPT, ANSWER, RANK = 4, 40, 24, 16
BUCKET = 50_000  # elements


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters `actor` and `critic` on one base."""
    folder, tokenizer, lora = tmp_path_factory.mktemp("roles"), byte_tokenizer(), LoraConfig(RANK)
    base = str(folder / "base")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    tiny_llama(**sizes, num_attention_heads=4).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for name, module in (
        ("actor", create_hf_model(base, tokenizer, torch.float32)),
        ("critic", create_critic_model(base, tokenizer, torch.float32, init_head=True)),
    ):
        out = folder / name
        adapted = with_adapter(module, lora)
        save_hf_format(adapted, tokenizer, out, ALONE, plan("adapter", base, lora, out))
    return folder


def settings_of(folders: Path, tmp_path: Path, **flags: Any) -> RLHFSettings:
    json_file = tmp_path / "ds.json"
    json_file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": BUCKET}}))
    return RLHFSettings.of(
        actor_model_name_or_path=str(folders / "actor"),
        critic_model_name_or_path=str(folders / "critic"),
        data_path=["rows"],
        max_prompt_seq_len=PROMPT,
        max_answer_seq_len=ANSWER,
        min_answer_seq_len=ANSWER,
        per_device_generation_batch_size=ROWS,
        per_device_training_batch_size=ROWS,
        rollout_engine="generate",
        deepspeed_config=str(json_file),
        **flags,
    )


def measured(
    settings: RLHFSettings, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, dict[str, int]]:
    """Bytes held between iterations, and the peak of each phase of the third one."""
    counted, peaks = Allocations(), dict[str, int]()

    def phase(name: str, function: Callable, before: str | None = None) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                peaks[before] = counted.peak
            counted.start_again()
            done = function(*args, **kwargs)
            peaks[name] = max(peaks.get(name, 0), counted.peak)
            counted.start_again()
            return done

        return run

    monkeypatch.setattr(
        ppo_trainer, "scored", phase(SCORING, ppo_trainer.scored, before=GENERATION)
    )
    for name in ("actor", "critic"):
        step = getattr(Updates, f"{name}_step")
        monkeypatch.setattr(Updates, f"{name}_step", phase(name, step))
    with counted:
        setup = settings.role_setup(dtype, iterations=10)
        roles = DeepSpeedRLHFEngine.load(setup, byte_tokenizer(), init_distributed())
        trainer = DeepSpeedPPOTrainer(roles, settings.ppo, 1, None, seed=1)
        ids = torch.full((ROWS, PROMPT), 5)
        mask, real = torch.ones_like(ids, dtype=torch.bool), torch.ones(ROWS, dtype=torch.bool)
        prompts = [PromptBatch(ids, mask, real)] * settings.ppo.generation_batches
        for _ in range(3):
            gc.collect()
            held = counted.live
            counted.start_again()
            trainer.train_rlhf(trainer.rollout(prompts))
    for engine in roles.trained.values():
        engine.destroy()
    return held, peaks


def total(memory: MemoryPlan, name: str) -> tuple[float, float]:
    """Bytes of the tensors in a phase, by the plan; those of its buckets."""
    held = sum(sum(kinds.values()) for kinds in memory.held.values())
    worst = max((p for p in memory.phases if p.name.split(",")[0] == name), key=lambda p: p.total)
    return held + worst.total, worst.needs.get(BUCKETS, 0.0)


CORE = [("bf16", {"share_trunk": "auto"})]
OTHERS = [
    ("bf16", {"share_trunk": "all"}),
    ("bf16", {"share_trunk": "none", "gradient_accumulation_steps": 2, "generation_batches": 2}),
    ("fp32", {"share_trunk": "none", "checkpointing": True, "zero_stage": 1}),
    ("bf16", {"share_trunk": "auto", "zero_stage": 2}),
    ("bf16", {"share_trunk": "none", "lora_dim": 0, "zero_stage": 2}),
    ("bf16", {"share_trunk": "none", "quantize_base": "4bit"}),
]
OF_BOTH = {"checkpointing": "gradient_checkpointing"} | {
    name: name for name in ("lora_dim", "zero_stage", "quantize_base")
}


@pytest.mark.parametrize(
    ("dtype", "flags"), [*CORE, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in OTHERS)]
)
def test_an_iteration_allocates_what_is_planned(folders, tmp_path, monkeypatch, dtype, flags):
    flags = {"lora_dim": RANK} | flags
    both = {OF_BOTH[name]: value for name, value in flags.items() if name in OF_BOTH}
    own = {name: value for name, value in flags.items() if name not in OF_BOTH}
    own |= {f"{role}_{name}": value for role in ("actor", "critic") for name, value in both.items()}
    settings = settings_of(folders, tmp_path, dtype=dtype, **own)
    configs = {name: load_config(str(folders / "base")) for name in ("actor", "critic")}
    memory = plan_memory(settings, configs, dtype, 1)
    held, peaks = measured(settings, dtype, monkeypatch)
    planned = sum(sum(kinds.values()) for kinds in memory.held.values())
    # What docs/scaling.md promises: 1 %, for scalars as in the test of the states.
    assert planned == pytest.approx(held, rel=0.01)
    if settings.ppo.first_pass_is_last(settings.ppo.generation_batches):
        peaks["critic"] = max(peaks["critic"], peaks.pop(SCORING))  # its forward pass is there
    for name, peak in peaks.items():
        planned, buckets = total(memory, name)
        assert 0.95 * peak <= planned, name
        assert planned - buckets <= 1.05 * peak, name  # buckets may come after the peak
