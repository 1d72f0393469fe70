"""Step 3 from the command line: merged and adapter folders in every role, one trunk, resumed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers.adapters import ALONE, plan, with_adapter
from tests.helpers.resume_runs import (
    PPO_COMMON,
    Outcome,
    Run,
    assert_same_end,
    figures,
    interrupted,
    launch_runs,
    write_models,
)
from tests.helpers.rounding import DIFFERENT, LOGITS, NEAR_ONE
from tests.helpers.steps_outputs import assert_all_finite, load
from tests.helpers.tiny import byte_tokenizer

# Two iterations; where a flag comes twice the later one counts.
SHORT = [*PPO_COMMON, "--max_train_samples", "4", "--dtype", "fp32", "--reward_scaling", "none"]
ADAPTERS = [*SHORT, "--actor_model_name_or_path", "sft-adapter"]
ADAPTERS += ["--critic_model_name_or_path", "reward-adapter", "--critic_lora_dim", "4"]
ADAPTERS += ["--actor_trainable_tokens", "</s>", "--critic_trainable_tokens", "</s>", "5"]
ADAPTERS += ["--deepspeed_config", "adam.json"]
ONE_TRUNK = [*ADAPTERS, "--share_trunk", "all"]
# No critic: the reward model is a tree of the same trunk. The coefficient and the place in the text
# are what the second iteration depends on beside the weights.
GROUPS = [*SHORT, "--actor_model_name_or_path", "sft-adapter", "--share_trunk", "all"]
GROUPS += ["--critic_model_name_or_path", "reward-adapter", "--actor_zero_stage", "2"]
GROUPS += ["--advantage_estimator", "grpo", "--ppo_epochs", "2", "--update_kl_limit", "1e-4"]
GROUPS += ["--kl_target", "0.5", "--kl_horizon", "8", "--temperature", "0.7"]
GROUPS += ["--stop_strings", "a", "b", "--fuse_lora_for_generation"]
GROUPS += ["--actor_trainable_tokens", "</s>", "9"]
RUNS = {
    **interrupted(ONE_TRUNK, "one", save_steps=1, killed=2),
    **interrupted(GROUPS, "groups", save_steps=1, killed=2),
    "other layout": Run([*ADAPTERS, "--save_steps", "1", "--output_dir", "one-killed", "--resume"]),
    "two": Run([*ADAPTERS, "--output_dir", "two"]),
    "four": Run([*ADAPTERS, "--share_trunk", "none", "--output_dir", "four"]),
    "merged": Run(
        [*SHORT, "--reward_model_name_or_path", "reward-adapter", "--output_dir", "merged"]
    ),
    "headless": Run(
        [
            *(*ADAPTERS, "--critic_model_name_or_path", "model", "--init_head_randomly"),
            *("--reward_model_name_or_path", "critic", "--lora_save", "both"),
            *("--output_dir", "headless"),
        ]
    ),
}


def write_adapters(folder: Path) -> None:
    """`sft-adapter` and `reward-adapter` on `model`."""
    tokenizer, base = byte_tokenizer(), str(folder / "model")
    torch.manual_seed(5)
    models = {
        "sft-adapter": create_hf_model(base, tokenizer, torch.float32),
        "reward-adapter": create_critic_model(base, tokenizer, torch.float32, init_head=True),
    }
    for seed, (name, model) in enumerate(models.items(), 1):
        lora, out = LoraConfig(lora_dim=2, lora_alpha=3.0), folder / name
        adapted = with_adapter(model, lora, seed)
        save_hf_format(adapted, tokenizer, out, ALONE, plan("adapter", base, lora, out))


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("roles")
    write_models(folder)
    write_adapters(folder)
    return folder, launch_runs(RUNS, folder, ranks=1)


def assert_loads(folder: Path, *names: str) -> None:
    for name in names:
        is_critic = name == "critic"
        kind = AutoModelForSequenceClassification if is_critic else AutoModelForCausalLM
        load(kind, folder / name)


@pytest.mark.parametrize("name", ["two", "four", "merged", "headless", "one complete"])
def test_it_runs_and_saves_models(ran, name):
    folder, outcomes = ran
    assert outcomes[name].code == 0, outcomes[name].stderr[-3000:]
    output = folder / name.replace(" ", "-")
    assert_all_finite(output)
    assert_loads(output, "actor", "critic", "actor_ema")


def test_each_weight_is_read_once_for_one_trunk(ran):
    _, outcomes = ran
    read = {name: [Path(p).name for p in outcomes[name].read] for name in outcomes}
    assert read["one complete"] == ["model"]
    assert read["two"] == ["model"] * 2
    assert read["four"] == ["model"] * 4
    assert read["merged"] == ["model", "critic", "model"]
    assert read["headless"] == ["model", "model", "critic"]


def test_every_layout_gives_the_same_figures(ran):
    folder, _ = ran
    expected = figures(folder / "four")
    assert len(expected) >= 4
    for name in ("two", "one-complete"):
        lines = figures(folder / name)
        assert [line.keys() for line in lines] == [line.keys() for line in expected]
        for line, other in zip(lines, expected, strict=True):
            numbers = {k: v for k, v in other.items() if isinstance(v, int | float)}
            # Explained variances are quotients of squares: four times the rounding of a number.
            found = {k: line[k] for k in numbers}
            assert found == pytest.approx(numbers, abs=LOGITS, rel=4 * NEAR_ONE)


def test_one_trunk_resumes_bit_for_bit(ran):
    folder, outcomes = ran
    assert [outcomes[f"one {n}"].code for n in ("complete", "killed", "resumed")] == [0, -9, 0]
    assert "resumed from one-killed/checkpoints/step-000001" in outcomes["one resumed"].stdout
    assert_same_end(folder / "one-complete", folder / "one-killed")


def test_without_a_critic_it_resumes_bit_for_bit(ran):
    folder, outcomes = ran
    assert [outcomes[f"groups {n}"].code for n in ("complete", "killed", "resumed")] == [0, -9, 0]
    assert "resumed from groups-killed/checkpoints/step-000001" in outcomes["groups resumed"].stdout
    assert_same_end(folder / "groups-complete", folder / "groups-killed")
    assert_loads(folder / "groups-complete", "actor", "actor_ema")
    assert not (folder / "groups-complete" / "critic").exists()
    first, second = (f for f in figures(folder / "groups-complete") if f["kind"] == "train")
    # Before temperature and folding mattered; the decoder's log-probabilities round by themselves.
    assert first["ratio"] == 1.0 and abs(first["kl"]) < LOGITS
    assert second["kl_coefficient"] != first["kl_coefficient"]
    assert first["update_kl"] > DIFFERENT and first["actor_updates"] < 1
    assert not any("critic" in name or "value" in name for name in first)


def test_another_layout_does_not_resume(ran):
    _, outcomes = ran
    assert "saved with share_trunk all, now auto; give all" in outcomes["other layout"].error


def test_a_critic_on_a_language_model_can_be_saved_as_an_adapter(ran):
    folder, outcomes = ran
    assert (folder / "headless/critic/adapter/adapter_config.json").is_file()
    assert not (folder / "headless/actor/adapter").exists()
    assert "sft-adapter is an adapter itself" in outcomes["headless"].stdout
    tokenizer = byte_tokenizer()
    merged, adapter = (
        create_critic_model(str(folder / "headless" / f), tokenizer, torch.float32).eval()
        for f in ("critic", "critic/adapter")
    )
    ids = torch.arange(3, 23).view(2, 10)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids, mask), adapter(ids, mask), atol=LOGITS, rtol=0)
