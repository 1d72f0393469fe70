"""When the start speaks up about adapters, and when it keeps quiet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dschat.arguments import RewardSettings, RLHFSettings, SFTSettings
from dschat.cli import parse
from dschat.utils.advice import lora_advice
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.lora_layers import LoraConfig
from dschat.utils.optim import OptimizerConfig

FULL = 1e-5
LORA = LoraConfig(dim=16)
RATES = OptimizerConfig(learning_rate=3e-5, full_rate=FULL)
ENGINE = EngineConfig(dtype="bf16")


def advice(lora: LoraConfig = LORA, engine: dict | None = None, ranks: int = 1, **rates) -> str:
    found = lora_advice(lora, replace(RATES, **rates), replace(ENGINE, **(engine or {})), ranks)
    assert all(line.startswith("advice: ") and "\n" not in line for line in found)
    return "\n".join(found)


def test_the_rules_of_thumb_themselves_are_quiet():
    assert advice() == ""
    assert advice(loraplus_lr_ratio=8.0) == advice(loraplus_lr_ratio=16.0) == ""
    assert advice(loraplus_lr_ratio=32.0, lora_learning_rate=1.5e-5) == ""
    assert advice(lora_learning_rate=2e-5) == ""
    assert lora_advice(None, replace(RATES, learning_rate=1e-9), ENGINE, 1) == []


@pytest.mark.parametrize("ratio", [0.5, 1.0, 4.0, 40.0])
def test_ratio_outside_the_authors_range(ratio: float):
    found = advice(loraplus_lr_ratio=ratio, lora_learning_rate=1.1e-5)
    assert found.count("\n") == 0 and f"loraplus_lr_ratio {ratio:g}" in found and "16" in found
    assert ("more slowly than A" in found) == (ratio < 1)
    assert ("plain LoRA" in found) == (ratio == 1)


def test_adapters_at_full_fine_tunings_rate():
    assert "no more than full fine-tuning would take (1e-05)" in advice(lora_learning_rate=FULL)
    assert "two to three times" in advice(learning_rate=FULL / 2)
    assert advice(lora_learning_rate=FULL * 1.01) == ""


def test_ratio_raised_with_a_as_it_was():
    found = advice(loraplus_lr_ratio=32.0)
    assert "B's rate to 0.00096 while A's is still 3e-05" in found
    assert "lora_learning_rate 1.5e-05" in found
    assert advice(loraplus_lr_ratio=32.0, lora_learning_rate=1.5e-5) == ""
    # Where the lowered rate would be full fine-tuning's, it is not what is proposed.
    found = advice(loraplus_lr_ratio=64.0)
    assert "try loraplus_lr_ratio 16" in found and "lora_learning_rate" not in found


def test_many_directions_on_one_device_without_accumulation():
    large = LoraConfig(dim=128)
    assert "gradient_accumulation_steps 8" in advice(large)
    assert advice(large, ranks=2) == advice(large, {"gradient_accumulation_steps": 8}) == ""
    assert advice(LoraConfig(dim=64)) == ""


def test_fp16_adapters():
    assert "take bf16" in advice(engine={"dtype": "fp16"})
    assert advice(engine={"dtype": "fp32"}) == ""


@pytest.mark.parametrize("settings", [SFTSettings, RewardSettings, RLHFSettings])
def test_the_defaults_of_every_step_follow_the_advice(settings: type):
    names = ["--actor_", "--critic_"] if settings is RLHFSettings else ["--"]
    argv = [word for name in names for word in (f"{name}lora_dim", "16")]
    for name in names:
        argv += [f"{name}model_name_or_path", "x"]
    found = parse(settings, argv, "")
    models = [found.actor, found.critic] if settings is RLHFSettings else [found.model]
    for model in models:
        assert lora_advice(model.lora.config(), model.optimizer_config(), ENGINE, 1) == []
