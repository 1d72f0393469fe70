"""When the start speaks up about adapters, and when it keeps quiet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.cli import parse
from dschat.train.advice import lora_advice
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim_config import OptimizerConfig, first_lora_rate

FULL = 1e-5
START = 3 / 4 * FULL  # at a ratio of 16
LORA = LoraConfig(lora_dim=16)
RATES = OptimizerConfig(full_rate=FULL)
ENGINE = EngineConfig(zero_stage=0, micro_batch_size=1, dtype="bf16")


SIZE = 1.3e9


def advice(
    lora: LoraConfig = LORA,
    engine: dict | None = None,
    ranks: int = 1,
    size: float = SIZE,
    **rates,
) -> str:
    config = replace(ENGINE, **(engine or {}))
    found = lora_advice(lora, replace(RATES, **rates), config, ranks, size)
    assert all(line.startswith("advice: ") and "\n" not in line for line in found)
    return "\n".join(found)


def test_the_rules_of_thumb_themselves_are_quiet():
    assert first_lora_rate(FULL, 16.0) == pytest.approx(START)
    assert first_lora_rate(FULL, 1.0) == pytest.approx(3 * FULL)
    assert advice() == ""
    for ratio in (8.0, 16.0, 32.0):
        rate = first_lora_rate(FULL, ratio)
        assert advice(loraplus_lr_ratio=ratio, lora_learning_rate=rate) == ""
    assert lora_advice(LoraConfig(), replace(RATES, learning_rate=1e-9), ENGINE, 1, SIZE) == []


@pytest.mark.parametrize("ratio", [0.5, 1.0, 4.0, 40.0])
def test_ratio_outside_the_authors_range(ratio: float):
    rate = first_lora_rate(FULL, ratio)
    found = advice(loraplus_lr_ratio=ratio, lora_learning_rate=rate)
    assert found.count("\n") == 0 and f"loraplus_lr_ratio {ratio:g}" in found and "16" in found
    assert ("more slowly than A" in found) == (ratio < 1)
    assert ("plain LoRA" in found) == (ratio == 1)


def test_adapters_no_faster_than_the_whole_model_would_be():
    """At a ratio of 16 the mean of A's rate and B's is four times A's."""
    slow = advice(lora_learning_rate=FULL / 4)
    basis = "full fine-tuning of about 1.3B parameters would (1e-05)"
    assert f"at 2.5e-06 and 4e-05, in the mean no faster than {basis}; adapters take more" in slow
    assert "two to three times that to start from (DeepSpeed-Chat), up to ten at alpha 32" in slow
    assert slow.endswith("start from lora_learning_rate 7.5e-06")
    assert advice(lora_learning_rate=FULL / 3.9) == ""
    plain = advice(lora_learning_rate=FULL, loraplus_lr_ratio=1.0)
    assert "at 1e-05 and 1e-05, in the mean no faster" in plain and "plain LoRA" in plain
    assert "in the mean" not in advice(lora_learning_rate=1.01 * FULL, loraplus_lr_ratio=1.0)


def test_ratio_raised_with_a_as_it_was():
    """On top of what plain LoRA would take, or of what suits a ratio of 16."""
    found = advice(lora_learning_rate=2 * FULL)
    assert "loraplus_lr_ratio 16 raises B's rate to 0.00032, and A's is still 2e-05" in found
    assert found.endswith("start from lora_learning_rate 7.5e-06")
    found = advice(loraplus_lr_ratio=32.0, lora_learning_rate=START)
    assert found.endswith("start from lora_learning_rate 5.3e-06")
    assert advice(lora_learning_rate=1.9 * FULL) == ""
    assert advice(loraplus_lr_ratio=32.0, lora_learning_rate=0.9 * START) == ""


def test_rates_are_silent_about_sizes_that_they_do_not_know():
    """Of a step's own rate four times up and down; a rate that was given holds for any model."""
    slow, fast = {"lora_learning_rate": FULL / 4}, {"lora_learning_rate": 2 * FULL}
    for size, said in ((260e3, False), (SIZE / 5, False), (SIZE / 4, True), (SIZE * 4, True)):
        assert ("in the mean" in advice(size=size, **slow)) == said
        assert ("raises B's rate" in advice(size=size, **fast)) == said
    assert advice(size=70e9, **slow) == ""
    given = advice(size=260e3, learning_rate=1e-3, lora_learning_rate=1e-5)
    assert "no faster than the learning_rate given for full fine-tuning (0.001)" in given
    assert given.endswith("start from lora_learning_rate 0.00075")
    reward = replace(RATES, full_rate_size=3.5e8, lora_learning_rate=FULL / 4)
    (line,) = lora_advice(LORA, reward, ENGINE, 1, 331e6)
    assert "full fine-tuning of about 350M parameters would" in line


def test_a_scaling_acts_as_a_ratio_does():
    """alpha = 4r doubles what A's rate does; alpha = r / 16 quarters it."""
    rate = {"lora_learning_rate": 1.5 * FULL}
    assert advice(**rate) == ""
    hot = advice(LoraConfig(lora_dim=16, lora_alpha=64.0), **rate)
    assert "raises B's rate" in hot and hot.endswith("start from lora_learning_rate 3.8e-06")
    assert "in the mean" in advice(LoraConfig(lora_dim=16, lora_alpha=1.0), lora_learning_rate=FULL)
    assert advice(lora_learning_rate=FULL) == ""


def test_many_directions_on_one_device_without_accumulation():
    large = LoraConfig(lora_dim=128)
    assert "gradient_accumulation_steps 8" in advice(large)
    assert advice(large, ranks=2) == advice(large, {"gradient_accumulation_steps": 8}) == ""
    assert advice(LoraConfig(lora_dim=64)) == ""


def test_fp16_adapters():
    assert "take bf16" in advice(engine={"dtype": "fp16"})
    assert advice(engine={"dtype": "fp32"}) == ""


@pytest.mark.parametrize("settings", [SFTSettings, RewardSettings, DPOSettings, RLHFSettings])
def test_the_defaults_of_every_step_follow_the_advice(settings: type):
    names = ["--actor_", "--critic_"] if settings is RLHFSettings else ["--"]
    argv = [word for name in names for word in (f"{name}lora_dim", "16")]
    for name in names:
        argv += [f"{name}model_name_or_path", "x"]
    found = parse(settings, argv, "")
    models = [found.actor, found.critic] if settings is RLHFSettings else [found.model]
    for model in models:
        assert lora_advice(model.lora, model.optimizer, ENGINE, 1, SIZE / 2) == []
