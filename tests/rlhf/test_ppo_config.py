import pytest

from dschat.errors import UserError
from dschat.rlhf.ppo_config import PPOConfig

RLOO = {"advantage_estimator": "rloo", "answers_per_prompt": 2}
GRPO = {"advantage_estimator": "grpo", "answers_per_prompt": 2}


def config(**settings: object) -> PPOConfig:
    return PPOConfig(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cliprange": 0.0}, "cliprange is 0.0"),
        ({"cliprange_value": -1.0}, "cliprange_value is -1.0"),
        ({"kl_coef": -0.1}, "kl_coef is -0.1"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is -1.0"),
        ({"gamma": 1.1}, "gamma is 1.1"),
        ({"lam": -0.1}, "lam is -0.1"),
        ({"ppo_epochs": 0}, "ppo_epochs is 0"),
        ({"per_device_generation_batch_size": 0}, "per_device_generation_batch_size is 0"),
        ({"per_device_training_batch_size": 0}, "per_device_training_batch_size is 0"),
        ({"answers_per_prompt": 0}, "answers_per_prompt is 0"),
        ({"critic_warmup_iterations": -1}, "critic_warmup_iterations is -1"),
        ({"update_kl_limit": -0.1}, "update_kl_limit is -0.1"),
        ({"advantage_estimator": "ppo"}, "advantage_estimator is ppo: choose one of gae, rloo"),
        ({"kl_estimator": "k2"}, "kl_estimator is k2: choose one of k1, k3"),
        ({"whiten_advantages": "on"}, "whiten_advantages is on: choose one of auto, always"),
        ({"kl_horizon": 100}, "kl_horizon is 100, but kl_coef is fixed: give kl_target"),
        ({"kl_target": 0.0}, "kl_target is 0.0"),
        ({"kl_target": 6.0, "kl_horizon": 0}, "kl_horizon is 0"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target scales kl_coef, which is 0"),
        ({"advantage_estimator": "rloo"}, "answers_per_prompt is 1: give 2 or more"),
        ({"advantage_estimator": "grpo"}, "answers_per_prompt is 1: give 2 or more"),
        ({**RLOO, "gamma": 0.9}, "gamma is 0.9, but advantage_estimator rloo has no critic"),
        ({**GRPO, "lam": 0.9}, "drop lam"),
        ({**RLOO, "cliprange_value": 0.0}, "drop cliprange_value"),
        ({**GRPO, "critic_warmup_iterations": 2}, "drop critic_warmup_iterations"),
        ({**GRPO, "kl_estimator": "k1"}, "kl_estimator is k1, but advantage_estimator grpo"),
        ({**GRPO, "whiten_advantages": "always"}, "whiten_advantages is always, but grpo"),
    ],
)
def test_coefficients_that_make_no_sense(settings, message):
    with pytest.raises(UserError) as error:
        config(**settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_whitened_and_where_the_kl_is():
    assert config().whitens and not config(whiten_advantages="never").whitens
    assert not config(**RLOO).whitens and config(**RLOO, whiten_advantages="always").whitens
    assert not config(**GRPO).whitens
    assert config(**GRPO).estimator.kl_in_loss and not config(**RLOO).estimator.kl_in_loss
    assert not config().estimator.kl_in_loss
    assert config(**GRPO, kl_estimator="k3").estimator.kl_in_loss
