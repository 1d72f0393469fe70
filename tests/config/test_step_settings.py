"""Settings of the steps: which a resumed run may give otherwise, and building them from Python."""

import pytest

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.cli import parse
from dschat.errors import UserError
from dschat.functional.preferences import PREFERENCE_LOSSES
from dschat.settings import flags_of

SERVERS = {"vllm_url", "vllm_adapter_dir", "vllm_timeout", "vllm_sleep"}
RATES = {
    *("learning_rate", "head_learning_rate", "lora_learning_rate"),
    *("lora_embedding_learning_rate", "loraplus_lr_ratio", "trainable_tokens_learning_rate"),
}
COMMON = {
    *(
        "output_dir",
        "overwrite_output_dir",
        "save_steps",
        "save_total_limit",
        "resume",
        "resume_with_new_rates",
    ),
    *("log_every", "enable_tensorboard", "tensorboard_path", "wandb_project", "no_report"),
    *("report_to", "trackio_project"),
    *("deepspeed", "local_rank", "only_optimize_lora"),
    *("data_output_path", "preprocessing_num_workers", "max_skipped_steps"),
    *("rank_timeout", "ignore_plan", "verbose", "push_to_hub", "push_public"),
    *("deepspeed_config", "dtype"),  # compared by what they come to
}
ROLES = {
    *("actor_model_name_or_path", "critic_model_name_or_path", "reward_model_name_or_path"),
    *("print_answers", "print_answers_interval"),
    *(f"{role}_{rate}" for role in ("actor", "critic") for rate in RATES),
}


@pytest.mark.parametrize(
    "settings, expected",
    [
        (SFTSettings, COMMON | RATES | {"model_name_or_path", "print_loss"}),
        (RewardSettings, COMMON | RATES | {"model_name_or_path"}),
        (DPOSettings, COMMON | RATES | {"model_name_or_path", "print_loss"}),
        (RLHFSettings, COMMON | ROLES | SERVERS),
    ],
)
def test_exactly_these_may_change(settings, expected):
    flags = [flag for flag in flags_of(settings) if not flag.rule.retired]
    assert {flag.name for flag in flags if flag.rule.may_change} == expected


def test_settings_without_the_command_line():
    settings = SFTSettings.of(model_name_or_path="m", lora_dim=8, seed=3, output_dir="o")
    assert (settings.model.lora.lora_dim, settings.run.seed, settings.run.output_dir) == (8, 3, "o")
    assert settings.run.log.tensorboard_path == "step1_tensorboard"
    assert settings.model.optimizer.full_rate == 9.65e-6
    argv = ["--model_name_or_path", "m", "--lora_dim", "8", "--seed", "3", "--output_dir", "o"]
    assert settings == parse(SFTSettings, argv, "")


def test_each_preference_loss_brings_its_own_rate():
    """Of all weights; A's is 10 / sqrt(16) of it. A rate that is given stays."""
    for name, loss in PREFERENCE_LOSSES.items():
        rates = DPOSettings.of(model_name_or_path="m", loss_type=name).model.optimizer
        assert rates.base_rate == loss.full_rate, name
        assert rates.lora_A_rate == pytest.approx(2.5 * loss.full_rate), name
    argv = ["--model_name_or_path", "m", "--loss_type", "simpo"]
    rates = parse(DPOSettings, argv, "").model.optimizer
    assert rates.base_rate == PREFERENCE_LOSSES["simpo"].full_rate
    assert rates.base_rate < PREFERENCE_LOSSES["sigmoid"].full_rate
    rates = parse(DPOSettings, [*argv, "--learning_rate", "3e-6"], "").model.optimizer
    assert rates.base_rate == rates.lora_A_rate == 3e-6


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")])
def test_numbers_that_no_setting_takes(value):
    with pytest.raises(UserError, match="centering_coefficient is "):
        RewardSettings.of(model_name_or_path="m", centering_coefficient=value)
