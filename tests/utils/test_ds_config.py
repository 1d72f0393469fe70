"""DeepSpeed's configuration: our numbers, the user's JSON over them, and what is refused."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
from deepspeed.compile.config import CompileConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dschat.config import RewardSettings, RLHFSettings
from dschat.config.unused import unused_flags
from dschat.errors import UserError
from dschat.train.engine import build_engine, refusals_named
from dschat.train.model_config import ModelConfig
from dschat.train.optimizer_block import check_optimizer_block
from dschat.utils.ds_utils import EngineConfig, get_eval_ds_config, get_train_ds_config
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import schedule_factory
from tests.helpers import tiny
from tests.helpers.launch import ROOT


def engine_config(**options) -> EngineConfig:
    return EngineConfig(**{"zero_stage": 0, "dtype": "bf16", "micro_batch_size": 1, **options})


@pytest.fixture
def merged(tmp_path: Path):
    """The configuration with this user JSON merged over it."""

    def merge(user: object, **options) -> dict:
        path = tmp_path / "ds.json"
        path.write_text(user if isinstance(user, str) else json.dumps(user))
        settings = {"zero_stage": 2, "micro_batch_size": 4, "gradient_accumulation_steps": 3}
        config = engine_config(**{**settings, **options}, deepspeed_config=str(path))
        return get_train_ds_config(config, world_size=2)

    return merge


def test_numbers():
    config = EngineConfig(
        zero_stage=3,
        dtype="bf16",
        offload=True,
        micro_batch_size=4,
        gradient_accumulation_steps=3,
        gradient_clipping=0.5,
    )
    ours = get_train_ds_config(config, world_size=2)
    assert ours["train_batch_size"] == 24
    assert ours["train_micro_batch_size_per_gpu"] == 4
    assert ours["gradient_accumulation_steps"] == 3
    assert ours["gradient_clipping"] == 0.5
    assert ours["bf16"] == {"enabled": True} and "fp16" not in ours
    assert ours["zero_optimization"]["stage"] == 3
    assert ours["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert ours["zero_optimization"]["offload_param"] == {"device": "cpu"}
    json.dumps(ours)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_precision_and_stage(stage: int, dtype: str):
    """Half precision at stage 0 runs as stage 1; bf16 gradients of a window add up in fp32."""
    ours = get_train_ds_config(
        engine_config(zero_stage=stage, dtype=dtype, gradient_accumulation_steps=2), world_size=1
    )
    assert ours["zero_optimization"]["stage"] == (1 if stage == 0 and dtype != "fp32" else stage)
    assert [k for k in ("bf16", "fp16") if k in ours] == ([dtype] if dtype != "fp32" else [])
    assert ("data_types" in ours) == (dtype == "bf16")
    assert "offload_optimizer" not in ours["zero_optimization"]


def test_frozen_models_are_sharded():
    ours = get_eval_ds_config("bf16")
    assert ours["zero_optimization"] == {"stage": 3} and ours["bf16"] == {"enabled": True}
    offloaded = get_eval_ds_config("fp32", offload=True)
    assert offloaded["zero_optimization"]["offload_param"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zero_stage": 4}, "zero_stage is 4: choose one of 0, 1, 2, 3"),
        ({"dtype": "fp8"}, "dtype is fp8: choose one of fp32, bf16, fp16"),
        ({"offload": True}, "offload needs ZeRO"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
    ],
)
def test_impossible_settings_are_refused(options: dict, words: str):
    with pytest.raises(UserError, match=words):
        engine_config(**options)


def test_user_json_is_merged_key_by_key(merged):
    """Nested keys beside ours, "auto" keeps ours at any depth, what is new comes in."""
    config = merged(
        {
            "train_batch_size": "auto",
            "gradient_clipping": 0.3,
            "zero_optimization": {
                "stage": "auto",
                "overlap_comm": False,
                "reduce_bucket_size": 1000,
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
            },
            "bf16": {"enabled": "auto"},
            "fp16": "auto",
            "comms_logger": {"enabled": True},
        }
    )
    assert config["train_batch_size"] == 24 and config["gradient_clipping"] == 0.3
    zero = config["zero_optimization"]
    assert zero["stage"] == 2 and zero["overlap_comm"] is False
    assert zero["reduce_bucket_size"] == 1000
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["stage3_gather_16bit_weights_on_model_save"] is False
    assert config["bf16"] == {"enabled": True}
    assert config["comms_logger"] == {"enabled": True}
    assert "fp16" not in config


def test_the_flags_stage_may_be_repeated(merged):
    assert merged({"zero_optimization": "auto"})["zero_optimization"]["stage"] == 2
    for dtype, runs_as in (("bf16", 1), ("fp32", 0)):
        user = {"zero_optimization": {"stage": 0}}
        assert merged(user, zero_stage=0, dtype=dtype)["zero_optimization"]["stage"] == runs_as


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "remove the scheduler block"),
        ({"train_batch_size": 25}, "train_batch_size 25 contradicts the settings' 24"),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "train_micro_batch_size_per_gpu 1 contradicts the settings' 4",
        ),
        (
            {"gradient_accumulation_steps": 1},
            "gradient_accumulation_steps 1 contradicts the settings' 3",
        ),
        ({"bf16": {"enabled": False}}, "bf16 .*contradicts dtype bf16"),
        ({"bf16": False}, "bf16 is False: give an object"),
        ({"fp16": {"enabled": True}}, "fp16 .*contradicts dtype bf16"),
        ({"bfloat16": {"enabled": True}}, "bfloat16 .*contradicts dtype bf16"),
        ({"zero_optimization": {"stage": 3}}, "'stage': 3. contradicts zero_stage 2"),
        ({"gradient_clipping": {"value": 1}}, "gradient_clipping is .*: give a plain value"),
        ({"zero_optimisation": {"stage": 2}}, "unknown key zero_optimisation; did you mean zero_"),
        ({"gradient_cliping": 1.0}, "unknown key gradient_cliping; did you mean gradient_clipping"),
        ({"checkpoint": {"load_universal": True}}, "load_universal would run code that a file of"),
        ({"qqq": 1}, "unknown key qqq; this DeepSpeed has none like it"),
        (
            {"zero_optimization": {"reduce_bucket_sise": 1000}},
            "zero_optimization: unknown key reduce_bucket_sise; did you mean reduce_bucket_size",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memry": True}}},
            "zero_optimization: offload_optimizer: unknown key pin_memry; did you mean pin_memory",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "x"}},
            "reduce_bucket_size is 'x': Input sho",
        ),
        (
            {"activation_checkpointing": {"profil": True}},
            "unknown key profil; did you mean profile",
        ),
        ({"optimizer": {"typ": "Adam"}}, "optimizer: unknown key typ; did you mean type"),
        ({"curriculum_learning": {"enabled": True}}, "DeepSpeed refuses it .*curriculum_learning"),
        ('{"fp16": "auto", "fp16": "auto"}', "not JSON .the key 'fp16' stands twice"),
        ({"gradient_clipping": "x"}, "gradient_clipping is 'x': give a number, 0 or more"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1: give a number, 0 or more"),
        ('{"gradient_clipping": NaN}', "gradient_clipping is nan: give a number, 0 or more"),
        ({"gradient_clipping": True}, "gradient_clipping is True: give a number, 0 or more"),
        ({"memory_breakdown": 2}, "memory_breakdown is 2: give true or false"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0: give a number above 0"),
        ({"steps_per_print": -3}, "steps_per_print is -3: give a number above 0"),
        (
            {"activation_checkpointing": {"number_checkpoints": -1}},
            "activation_checkpointing: number_checkpoints is -1: give a number, 0 or more",
        ),
        (
            {"zero_optimization": {"stage3_module_granularity_threshold": -1}},
            "stage3_module_granularity_threshold is -1: give a number, 0 or more",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu", "buffer_count": 0}}},
            "zero_optimization: offload_param: buffer_count is 0: give a number above 0",
        ),
        (
            {"zero_optimization": {"sub_group_size": True}},
            "zero_optimization: sub_group_size is True: give a number, 0 or more",
        ),
        ({"zero_optimization": {"overlap_comm": "x"}}, "overlap_comm is 'x'"),
        (
            {"zero_optimization": {"enabled": True}},
            r"unknown key enabled(?!; did you mean enabled)",
        ),
        ({"bf16": {"check_grad_overflow": 0}}, "check_grad_overflow is 0: give true or false"),
        ({"flops_profiler": {"top_modules": 0}}, "top_modules is 0: give a number above 0"),
        ({"flops_profiler": {"profile_step": "x"}}, "profile_step is 'x': give a number"),
        ({"flops_profiler": {"profile_stp": 2}}, "unknown key profile_stp; did you mean profile_"),
        ({"aio": {"queue_depth": -8}}, "aio: queue_depth is -8: give a number above 0"),
        ({"aio": {"queue_dept": 8}}, "unknown key queue_dept; did you mean queue_depth"),
        ({"checkpoint": {"tag_validaton": "Warn"}}, "unknown key tag_validaton; did you mean tag_"),
        ({"data_types": {"buffer_dtype": "x"}}, "data_types: buffer_dtype is 'x': give fp32"),
        ({"log_level": "loud"}, "log_level is 'loud': give one of debug, info, warning"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op sum would make updates depend"),
        ({"managed_gradient_accumulation": False}, "false would step once a micro-batch"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine: enabled True: generation is the p"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "precision than updates; giv"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel: autotp_size 2: adapters and"),
        ({"csv_monitor": {"enabled": True, "output_path": "/"}}, "metrics.jsonl has the figures"),
        ({"flops_profiler": {"output_file": "/x"}}, "output_file /x: the profile goes to standa"),
        ({"tensorboard": {"enabled": True}}, "enabled True: give report_to and tensorboard_path"),
        ({"wandb": {"enabled": True}}, "enabled True: give report_to and wandb_project"),
        ({"comet": {"enabled": True}}, "metrics.jsonl has the figures; remove the block"),
        ({"checkpoint": {"writer": {"type": "fast"}}}, "checkpoints are the programs' own; rem"),
        ({"gradient_clipping": 1e300}, "gradient_clipping is 1e.300: give at most 2.63 - 1"),
        ({"data_types": {"grad_accum_dtype": "fp99"}}, "grad_accum_dtype is 'fp99': give fp32"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON .nested too deeply"),
        ("[1]", "holds no JSON object"),
        (10**6 * " " + "{}", "has more than 1,000,000 bytes"),
    ],
)
def test_contradictions_are_refused_by_name_and_place(merged, user: object, words: str):
    with pytest.raises(UserError, match=words) as caught:
        merged(user)
    message = str(caught.value)
    assert message.startswith("deepspeed_config ") and "ds.json" in message
    assert "\n" not in message


def test_what_deepspeed_takes_passes(merged):
    """Blocks of every kind: read key by key, checked by a model, or somebody else's."""
    blocks = {
        "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}},
        "activation_checkpointing": {"partition_activations": True, "profile": False},
        "flops_profiler": {"enabled": False, "module_depth": -1, "output_file": None},
        "tensorboard": {"enabled": False},
        "aio": {"queue_depth": 8},
        "wall_clock_breakdown": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"use_node_local_storage": False},
        "zero_optimization": {
            "stage3_param_persistence_threshold": 10,
            "contiguous_gradients": True,
        },
        "communication_data_type": "fp32",
        "data_parallel_size": 1,
    }
    config = merged(blocks)
    assert blocks.keys() <= config.keys()


@pytest.mark.parametrize(
    ("user", "options", "words"),
    [
        ({"gradient_clipping": 0.3}, {}, "gradient_clipping 0.3 in place of the setting's 1.0"),
        ({"gradient_clipping": 0.3}, {"gradient_clipping": 0.3}, None),
        ({"gradient_clipping": 0}, {"gradient_clipping": 0.0}, None),
        ({"gradient_clipping": "auto"}, {"gradient_clipping": 0.3}, None),
        ({"gradient_clipping": 1}, {}, None),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/n"}}},
            {},
            "zero_optimization: offload_optimizer to the nvme, without --offload",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, {"offload": True}, None),
        ({"zero_optimization": {"cpu_offload": True}}, {}, "cpu_offload to the cpu, without"),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            {},
            "activation_checkpointing does nothing: layers are checkpointed by gradient_checkp",
        ),
        ({"dataloader_drop_last": True}, {}, "dataloader_drop_last does nothing: batches come"),
        ({"vocabulary_size": 32000}, {}, "vocabulary_size does nothing"),
    ],
)
def test_what_wins_over_a_setting_or_does_nothing_is_said(
    tmp_path: Path, user: dict, options: dict, words: str | None
):
    """By each program; what contradicts a setting that was given is refused."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(user))
    engine = engine_config(zero_stage=2, deepspeed_config=str(path), **options)
    lines = list(engine.user_config_effects())
    assert [line.startswith(f"deepspeed_config {path}: ") for line in lines] == [True] * len(lines)
    assert (lines == []) if words is None else (len(lines) == 1 and words in lines[0])
    flags = {"deepspeed_config": str(path), **options}
    step2 = RewardSettings.of(model_name_or_path="m", zero_stage=2, **flags)
    step3 = RLHFSettings.of(
        **dict.fromkeys(("actor_model_name_or_path", "critic_model_name_or_path"), "m"),
        **dict.fromkeys(("actor_zero_stage", "critic_zero_stage"), 2),
        **flags,
    )
    for settings in (step2, step3):
        assert [line for line in unused_flags(settings) if "deepspeed_config" in line] == lines


@pytest.mark.parametrize(
    ("user", "options", "words"),
    [
        (
            {"gradient_clipping": 0.3},
            {"gradient_clipping": 0.5},
            r"ds.json: gradient_clipping 0.3 contradicts gradient_clipping 0.5; make them equal",
        ),
        ({"gradient_clipping": 0}, {"gradient_clipping": 2.0}, "gradient_clipping 0 contradicts"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "none"}}},
            {"offload": True},
            "offload_optimizer none contradicts offload, which is to the CPU",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/n"}}},
            {"offload": True},
            "offload_param nvme contradicts offload",
        ),
    ],
)
def test_what_contradicts_a_given_setting_is_refused_at_once(
    tmp_path: Path, user: dict, options: dict, words: str
):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(user))
    with pytest.raises(UserError, match=words):
        RewardSettings.of(
            model_name_or_path="m", zero_stage=3, deepspeed_config=str(path), **options
        )


def test_every_number_of_deepspeeds_own_blocks_has_bounds(merged):
    """No key of any block that DeepSpeed reads takes what is negative, huge or of another kind."""
    taken = {
        "zero_optimization": ({}, DeepSpeedZeroConfig),
        "fp16": ({"dtype": "fp16"}, DeepSpeedFP16Config),
        "bf16": ({}, DeepSpeedBF16Config),
        "compile": ({}, CompileConfig),
    }
    for block, (options, model) in taken.items():
        for name, field in model.model_fields.items():
            key, is_switch = field.alias or name, isinstance(field.default, bool)
            is_number = isinstance(field.default, int | float) and not is_switch
            wrong = (-1, math.nan, 1e300, True) if is_number else (0, 2) if is_switch else ()
            for value in wrong if key not in ("stage", "enabled", "loss_scale") else ():
                with pytest.raises(
                    UserError, match=rf"{block}: {key} is|deprecated parameter '{key}'"
                ):
                    merged(json.dumps({block: {key: value}}), **options)


def test_unreadable_file_is_refused(tmp_path: Path):
    for path, words in ((tmp_path / "none.json", "no such file"), (tmp_path, "give a JSON file")):
        with pytest.raises(UserError, match=words):
            get_train_ds_config(engine_config(deepspeed_config=str(path)), 1)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"type": "Adam", "params": {"lr": 1e-5}}, "params.lr 1e-05 contradicts learning_rate"),
        ({"type": "Adam", "params": {"weight_decay": 1}}, "weight_decay 1 contradicts"),
        ({"params": {}}, "names no type"),
    ],
)
def test_optimizer_block_with_other_rates_is_refused(tmp_path: Path, block: dict, words: str):
    """The groups carry their own rates: the block's would be passed over in silence."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"optimizer": block}))
    model = ModelConfig(optimizer=OptimizerConfig(1e-3), lora=LoraConfig(lora_dim=4))
    config = engine_config(dtype="fp32", deepspeed_config=str(path))
    with pytest.raises(UserError, match=words):
        build_engine(tiny.tiny_llama(), config, model, schedule_factory("cosine", 0, 1), 1, "")


RECIPES = sorted((ROOT / "dschat/recipes/deepspeed").glob("*.json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_librarys_own_are_taken_at_zero_3(path: Path):
    """Each is whole in what DeepSpeed gets, and differs from what it gets without."""
    plain = engine_config(zero_stage=3)
    given = engine_config(zero_stage=3, deepspeed_config=str(path))
    found, before = get_train_ds_config(given, 16), get_train_ds_config(plain, 16)
    (own,) = json.loads(path.read_text()).values()
    assert found["zero_optimization"] == before["zero_optimization"] | own != before


def test_shards_that_deepspeed_does_not_make(merged, tmp_path: Path):
    near = {"zero_optimization": {"zero_hpz_partition_size": 3}}
    assert merged(near, zero_stage=3)  # of two processes, which are less than one machine
    few_bits = {"zero_optimization": {"zero_quantized_nontrainable_weights": True}}
    with pytest.raises(UserError, match=r"does nothing to models that load in shards; use quant"):
        merged(few_bits, zero_stage=3)
    path = tmp_path / "near.json"
    path.write_text(json.dumps(near))
    with pytest.raises(
        UserError, match="zero_hpz_partition_size 3 does not divide the 4 processes"
    ):
        get_train_ds_config(engine_config(zero_stage=3, deepspeed_config=str(path)), 4)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"type": 3}, "names no type"),
        ({"type": "Addam"}, "type 'Addam' is unknown; take one of adagrad, adam"),
        ({"type": "Adam", "params": {"betas": [2, 0.9]}}, "Adam refuses them .Invalid beta"),
        ({"type": "adamw", "params": {"beta": [0.9, 0.9]}}, "unexpected keyword argument 'beta'"),
        ({"type": "SGD", "params": {"momentum": -1}}, "SGD refuses them .Invalid momentum"),
        ({"type": "Adam", "params": {"torch_adam": True, "eps": 1e-6}}, None),
        ({"type": "Lamb", "params": {"max_coeff": 2}}, None),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_refused_before_weights(
    tmp_path: Path, block: dict, words: str | None
):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"optimizer": block}))
    if words is None:
        check_optimizer_block(str(path), OptimizerConfig())
        return
    with pytest.raises(UserError, match=words):
        check_optimizer_block(str(path), OptimizerConfig())


def test_what_deepspeed_refuses_late_is_one_line_too(tmp_path: Path):
    said = r"^deepspeed_config d: DeepSpeed: ValueError: a$"
    with pytest.raises(UserError, match=said), refusals_named("d"):
        raise ValueError("a\nb")
    said = "^deepspeed_config d: DeepSpeed: ModuleNotFoundError: No module named 'no_such'$"
    with pytest.raises(UserError, match=said), refusals_named("d"):
        importlib.import_module("no_such")
    with pytest.raises(ValueError, match="a"), refusals_named(None):
        raise ValueError("a")
