"""The names that users of DeepSpeed-Chat import keep importing, and are the functions in use."""

import importlib
import inspect

import pytest

STABLE_NAMES = {
    "dschat.utils.module.lora": (
        "convert_linear_layer_to_lora",
        "convert_lora_to_linear_layer",
        "only_optimize_lora_parameters",
        "make_model_gradient_checkpointing_compatible",
    ),
    "dschat.utils.utils": (
        "get_optimizer_grouped_parameters",
        "print_rank_0",
        "set_random_seed",
        "load_hf_tokenizer",
        "save_hf_format",
    ),
    "dschat.utils.ds_utils": ("get_train_ds_config", "get_eval_ds_config"),
    "dschat.utils.perf": (
        "print_throughput",
        "print_throughput_step3",
        "calculate_flops",
        "get_hf_configs",
    ),
    "dschat.utils.data.data_utils": ("create_prompt_dataset",),
    "dschat.utils.model.model_utils": ("create_hf_model", "create_critic_model"),
    "dschat.utils.model.reward_model": ("RewardModel",),
    "dschat.rlhf.rlhf_engine": ("DeepSpeedRLHFEngine",),
    "dschat.rlhf.ppo_trainer": ("DeepSpeedPPOTrainer",),
}
# Where the re-exported ones live; anything else there would be a second layer.
HOMES = {
    "get_optimizer_grouped_parameters": "dschat.utils.optim",
    "print_rank_0": "dschat.utils.distributed",
    "set_random_seed": "dschat.utils.distributed",
    "load_hf_tokenizer": "dschat.text.tokenizer",
    "save_hf_format": "dschat.models.save",
}
PAIRS = [(module, name) for module, names in STABLE_NAMES.items() for name in names]


@pytest.mark.parametrize(("module", "name"), PAIRS, ids=[f"{m}.{n}" for m, n in PAIRS])
def test_a_stable_name_imports_as_a_function_or_class_of_this_library(module: str, name: str):
    found = getattr(importlib.import_module(module), name)
    assert inspect.isfunction(found) or inspect.isclass(found)
    assert found.__name__ == name
    assert found.__module__.startswith("dschat.")
    assert inspect.getdoc(found)


@pytest.mark.parametrize("name", STABLE_NAMES["dschat.utils.utils"])
def test_utils_re_exports_the_function_itself(name: str):
    utils = importlib.import_module("dschat.utils.utils")
    home = importlib.import_module(HOMES[name])
    assert getattr(utils, name) is getattr(home, name)
    assert getattr(home, name).__module__ == HOMES[name]


def test_utils_holds_nothing_else():
    utils = importlib.import_module("dschat.utils.utils")
    public = {name for name in vars(utils) if not name.startswith("_")}
    assert public == set(STABLE_NAMES["dschat.utils.utils"]) == set(utils.__all__)


DOORS = ("dschat.utils.data.data_utils", "dschat.utils.model.model_utils")


@pytest.mark.parametrize("door", [*DOORS, "dschat.utils.model.reward_model"])
def test_a_door_holds_its_stable_names_alone(door: str):
    module = importlib.import_module(door)
    public = {name for name in vars(module) if not name.startswith("_")}
    assert public == set(STABLE_NAMES[door]) == set(module.__all__)
