"""A reward head alone, on a trunk that stays as it is."""

import pytest
import torch

from dschat.config import RewardSettings
from dschat.config.unused import unused_flags
from dschat.errors import UserError
from dschat.models.reward_model import RewardModel
from dschat.train.model_config import ModelConfig
from dschat.utils.optim import get_optimizer_grouped_parameters
from tests.helpers.tiny import padded, save_llama_folder, tiny_llama, token_rows


def test_nothing_but_the_head_trains_at_a_rate_of_its_own(tmp_path):
    config = ModelConfig.of().of_head_alone(32)
    model = config.apply(RewardModel(tiny_llama().model))
    (group,) = get_optimizer_grouped_parameters(model, config.optimizer)
    assert (group["name"], group["lr"]) == ("head", 2.0 / 32)
    assert group["params"] == [model.v_head.weight]
    model(*padded(token_rows(2, seed=0))).sum().backward()
    assert all(p.grad is None for p in model.rwtransformer.parameters())
    assert torch.isfinite(model.v_head.weight.grad).all()
    size = config.check(str(save_llama_folder(tmp_path / "model")), RewardModel.from_config)
    assert size.trained == model.v_head.weight.numel() == 32


def test_a_rate_that_is_given_stays():
    for given in ({"learning_rate": 1e-3}, {"head_learning_rate": 1e-3}):
        assert ModelConfig.of(**given).of_head_alone(32).optimizer.rate("head") == 1e-3


def test_adapters_contradict_and_checkpointing_has_no_use():
    with pytest.raises(UserError, match="train_head_only and lora_dim contradict"):
        RewardSettings.of(model_name_or_path="m", train_head_only=True, lora_dim=4)
    flags = {"train_head_only": True, "gradient_checkpointing": True}
    settings = RewardSettings.of(model_name_or_path="m", **flags)
    assert any("--gradient_checkpointing does nothing" in line for line in unused_flags(settings))
