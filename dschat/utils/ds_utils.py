"""Numbers in, DeepSpeed configuration out; the user's own JSON merged over it."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dschat.errors import UserError

DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class HybridConfig:
    """DeepSpeed's hybrid engine, which generates by kernels of its own."""

    max_out_tokens: int  # prompt and answer together
    inference_tp_size: int = 1
    release_inference_cache: bool = False
    pin_parameters: bool = True
    tp_gather_partition_size: int = 8


@dataclass(frozen=True)
class EngineConfig:
    """What DeepSpeed needs to know of a training engine."""

    zero_stage: int = 0
    dtype: str = "bf16"
    offload: bool = False
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_clipping: float = 1.0
    user_config: str | None = None  # path of a DeepSpeed JSON
    hybrid: HybridConfig | None = None

    def __post_init__(self):
        if self.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"zero_stage is {self.zero_stage}: choose 0, 1, 2 or 3")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}: choose {', '.join(DTYPES)}")
        if self.offload and self.zero_stage == 0:
            raise UserError("offload needs ZeRO: add a zero_stage of 1, 2 or 3, or drop --offload")
        for name in ("micro_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")


def get_train_ds_config(config: EngineConfig, world_size: int) -> dict:
    """DeepSpeed's configuration of a training engine.

    Half precision at stage 0 runs as stage 1: the same mathematics, but gradients of several
    micro-batches add up in fp32, and fp16 losses are scaled (DeepSpeed 0.19's stage 0 divides by a
    loss scale that `engine.backward` never applied).

    The user's JSON, where there is one, is merged over it; see `merge_user_config`.
    """
    stage = 1 if config.zero_stage == 0 and config.dtype != "fp32" else config.zero_stage
    zero = {
        "stage": stage,
        "overlap_comm": stage in (2, 3),
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    ours = {
        "train_batch_size": (
            config.micro_batch_size * config.gradient_accumulation_steps * world_size
        ),
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.gradient_clipping,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        **_precision(config.dtype),
    }
    if config.dtype == "bf16" and config.gradient_accumulation_steps > 1:
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.hybrid is not None:
        ours["hybrid_engine"] = {"enabled": True, **asdict(config.hybrid)}
    if config.user_config is None:
        return ours
    return merge_user_config(ours, config.user_config, config.zero_stage)


def get_eval_ds_config(config: EngineConfig, offload: bool = False) -> dict:
    """DeepSpeed's configuration of a frozen model under ZeRO-3; lower stages need no engine."""
    zero = {"stage": 3}
    if offload:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": zero,
        **_precision(config.dtype),
    }


def _precision(dtype: str) -> dict:
    if dtype == "bf16":
        return {"bf16": {"enabled": True}}
    if dtype == "fp16":
        return {"fp16": {"enabled": True, "loss_scale_window": 100}}
    return {}


def merge_user_config(ours: dict, path: str, zero_stage: int) -> dict:
    """Merge the DeepSpeed JSON at `path` over `ours`, key by key; "auto" keeps our value.

    Args:
        zero_stage: the flag's, which `ours` runs as stage 1 where 0 will not do.

    Raises:
        UserError: the file is missing or not JSON; it holds a scheduler block (one schedule would
            write one rate into all groups and level B's rate to A's); it contradicts a flag that
            the training loop depends on (batch sizes, accumulation, precision, ZeRO stage).
    """
    user = read_user_config(path)
    if "scheduler" in user:
        raise UserError(
            f"deepspeed_config {path}: remove the scheduler block, it would write one rate into "
            "every group and undo loraplus_lr_ratio; use --lr_scheduler_type and --num_warmup_steps"
        )
    merged = copy.deepcopy(ours)
    _merge_into(merged, user, f"deepspeed_config {path}:")
    flags = {
        "train_batch_size": "--per_device_train_batch_size",
        "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
        "gradient_accumulation_steps": "--gradient_accumulation_steps",
        "bf16": "--dtype",
        "bfloat16": "--dtype",
        "fp16": "--dtype",
    }
    for key, flag in flags.items():
        if flag == "--dtype":
            differs = _enabled(merged, key) != _enabled(ours, key)
        else:
            differs = merged[key] != ours[key]
        if differs:
            raise UserError(
                f"deepspeed_config {path}: {key} {user[key]} contradicts {flag}; "
                'make them equal or write "auto"'
            )
    zero = user.get("zero_optimization", "auto")
    theirs = "auto" if zero == "auto" else zero.get("stage", "auto")
    if theirs not in ("auto", zero_stage):
        raise UserError(
            f"deepspeed_config {path}: zero_optimization.stage {theirs} contradicts zero_stage "
            f"{zero_stage}; give the stage as a flag too"
        )
    merged["zero_optimization"]["stage"] = ours["zero_optimization"]["stage"]
    return merged


def read_user_config(path: str) -> dict:
    """The user's DeepSpeed JSON; UserError where it is missing or no JSON object."""
    try:
        found = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"deepspeed_config {path}: no such file") from error
    except OSError as error:
        raise UserError(f"deepspeed_config {path}: {error.strerror}; give a JSON file") from error
    except ValueError as error:
        raise UserError(f"deepspeed_config {path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"deepspeed_config {path}: holds no JSON object, write {{...}}")
    return found


def _enabled(config: dict, key: str) -> bool:
    block = config.get(key, False)
    return bool(block.get("enabled", False) if isinstance(block, dict) else block)


def _merge_into(base: dict, over: dict, place: str) -> None:
    for key, value in over.items():
        if value == "auto":
            continue
        if key in base and isinstance(base[key], dict) != isinstance(value, dict):
            kind = "an object" if isinstance(base[key], dict) else "a plain value"
            raise UserError(f"{place} {key} is {value!r}: give {kind}")
        if isinstance(value, dict):
            _merge_into(base.setdefault(key, {}), value, f"{place} {key}:")
        else:
            base[key] = value
