"""Imports and calls of DeepSpeed-Chat that changed end in one line that names the new place."""

import importlib
import re

import pytest
import torch

from dschat.utils.predecessor import changed, moved
from tests.helpers.tiny import byte_tokenizer, tiny_llama

GONE = {
    "dschat.utils.utils": (
        "to_device get_all_reduce_mean save_zero_three_model MovingAverage moving_average log_init "
        "get_tokenizer is_rank_0 load_state_dict_into_model ExponentialMovingAverage"
    ),
    "dschat.utils.data.data_utils": (
        "DataCollatorReward DataCollatorRLHF MiniDataset PromptDataset create_dataset "
        "create_dataset_split get_raw_dataset get_raw_dataset_split_index get_shuffle_idx "
        "get_unsupervised_data"
    ),
    "dschat.utils.data.raw_datasets": "PromptRawDataset DahoasRmstaticDataset LocalJsonFileDataset",
    "dschat.utils.model.model_utils": "causal_lm_model_to_fp32_loss configure_dropout",
    "dschat.utils.module.lora": "LinearLayer_LoRA",
    "dschat.utils.ds_utils": "GLOBAL_BATCH_SIZE MICRO_BATCH_SIZE",
    "dschat.rlhf.rlhf_engine": "log_init",
    "dschat.rlhf.ppo_trainer": (
        "DeepSpeedPPOTrainerUnsupervised gather_log_probs get_model_norm print_all_ranks"
    ),
}
NAMES = [(module, name) for module, names in GONE.items() for name in names.split()]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{m}.{n}" for m, n in NAMES])
def test_an_old_import_names_the_new_place(module: str, name: str):
    with pytest.raises(ImportError) as error:
        exec(f"from {module} import {name}")
    message = str(error.value)
    assert message.startswith(f"{module}.{name} of DeepSpeed-Chat is now ") and "\n" not in message
    for place in re.findall(r"dschat(?:\.\w+)+", message)[1:]:
        home, attribute = place.rsplit(".", 1)
        found = importlib.import_module(home)
        assert hasattr(found, attribute) or importlib.import_module(place), place


def test_other_names_fail_as_python_has_it():
    utils = importlib.import_module("dschat.utils.utils")
    assert not hasattr(utils, "no_such_name")
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec("from dschat.utils.utils import no_such_name")
    with pytest.raises(AttributeError, match="module 'm' has no attribute 'y'"):
        moved("m", {"x": "there"})("y")


def of(module: str, name: str):
    return getattr(importlib.import_module(module), name)


# Calls as DeepSpeed-Chat's scripts make them: module, name, positional arguments, the others.
CALLS = [
    ("dschat.utils.utils", "load_hf_tokenizer", ("path", True), {}),
    ("dschat.utils.utils", "load_hf_tokenizer", ("path",), {"fast_tokenizer": True}),
    ("dschat.utils.utils", "get_optimizer_grouped_parameters", ("model", 0.1), {}),
    (
        "dschat.utils.utils",
        "get_optimizer_grouped_parameters",
        ("model", 0.1),
        {"lora_lr": 5e-4},
    ),
    ("dschat.utils.utils", "save_hf_format", ("model", "tokenizer", "args"), {}),
    ("dschat.utils.utils", "save_hf_format", ("model", "tokenizer", "args", "sub"), {}),
    ("dschat.utils.ds_utils", "get_train_ds_config", (), {"offload": False, "stage": 2}),
    ("dschat.utils.ds_utils", "get_train_ds_config", (False, "fp16"), {}),
    ("dschat.utils.ds_utils", "get_eval_ds_config", (False,), {}),
    ("dschat.utils.ds_utils", "get_eval_ds_config", (), {"offload": False, "stage": 3}),
    ("dschat.utils.module.lora", "convert_linear_layer_to_lora", ("model", "decoder", 8), {}),
    ("dschat.utils.module.lora", "convert_linear_layer_to_lora", ("model", "decoder"), {}),
    (
        "dschat.utils.module.lora",
        "only_optimize_lora_parameters",
        ("model",),
        {"force_optimize_params": []},
    ),
    ("dschat.utils.model.model_utils", "create_hf_model", ("class", "name", "tok", {}), {}),
    ("dschat.utils.model.model_utils", "create_hf_model", (tiny_llama, "name", "tok"), {}),
    ("dschat.utils.model.model_utils", "create_critic_model", ("name", "tok", {}), {}),
    ("dschat.utils.model.model_utils", "create_critic_model", ("name", "tok", {}, 1), {}),
    ("dschat.utils.model.reward_model", "RewardModel", ("trunk", "tokenizer", 1), {}),
    (
        "dschat.utils.data.data_utils",
        "create_prompt_dataset",
        (0, ["Dahoas/rm-static"], "2,4,4", "/tmp", 1, 1234, "tokenizer", 512),
        {},
    ),
    ("dschat.utils.perf", "print_throughput", ("model", "args", 1.5), {"rank": 0}),
    ("dschat.utils.perf", "print_throughput_step3", ("a", "c", "args", 1, 2, 3, 4), {}),
    ("dschat.rlhf.ppo_trainer", "DeepSpeedPPOTrainer", ("engine", "args"), {}),
    (
        "dschat.rlhf.rlhf_engine",
        "DeepSpeedRLHFEngine",
        (),
        {"actor_model_name_or_path": "a", "critic_model_name_or_path": "c", "args": None},
    ),
]


@pytest.mark.parametrize(("module", "name", "args", "kwargs"), CALLS)
def test_an_old_call_says_how_it_is_written_now(module, name, args, kwargs):
    with pytest.raises(TypeError) as error:
        of(module, name)(*args, **kwargs)
    message = str(error.value)
    assert "; DeepSpeed-Chat's arguments changed to " in message and "\n" not in message
    assert message.endswith("; see docs/migration.md, Python names")


def test_a_call_that_fits_goes_through():
    @changed("f(x)", x=int)
    def f(x: int, y: int = 0) -> int:
        """Add."""
        return x + y

    assert f(1) == 1 and f(1, y=2) == 3 and f.__doc__ == "Add."
    with pytest.raises(
        TypeError, match=r"^x is of type str; DeepSpeed-Chat's arguments changed to f\(x"
    ):
        f("1")
    with pytest.raises(TypeError, match=r"^missing a required argument: 'x'; "):
        f()


def test_an_error_inside_the_function_stays_its_own():
    @changed("f()")
    def f() -> None:
        raise TypeError("of its own")

    with pytest.raises(TypeError, match=r"^of its own$"):
        f()


def test_the_tokenizer_by_its_new_arguments(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    load = of("dschat.utils.utils", "load_hf_tokenizer")
    assert load(str(tmp_path), add_eot_token=True).eos_token == "<|endoftext|>"
    assert torch.is_tensor(load(str(tmp_path))("a", return_tensors="pt").input_ids)
