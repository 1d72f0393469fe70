"""Settings in, DeepSpeed's configuration out; the user's own JSON merged over it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Any

from dschat.errors import UserError
from dschat.settings import Settings, setting
from dschat.utils.ds_effects import check_effects, check_numbers, contradicted, effects
from dschat.utils.ds_json import check_known, merge_into, read_user_config
from dschat.utils.predecessor import changed, moved

DTYPES = ("fp32", "bf16", "fp16")
ZERO_STAGES = (0, 1, 2, 3)
CLIPPING = 1.0
BUCKET = 500_000_000  # elements that DeepSpeed's buffer of gradients holds, whatever trains


@dataclass(frozen=True)
class EngineSettings(Settings):
    """Flags that all engines of a run share."""

    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step", at_least=1)
    max_skipped_steps: int = setting(
        50,
        "with fp16, optimizer steps in a row that may overflow and be skipped",
        at_least=1,
        may_change=True,
    )
    gradient_clipping: float = setting(
        CLIPPING, "largest gradient norm; 0: no clipping", at_least=0
    )
    offload: bool = setting(False, "keep optimizer states on the CPU (parameters too at ZeRO-3)")
    deepspeed_config: str | None = setting(None, "DeepSpeed JSON merged over ours", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deepspeed_config is not None:
            self._check_user_config(_user_config(self.deepspeed_config))

    def _check_user_config(self, user: dict) -> None:
        place = f"deepspeed_config {self.deepspeed_config}:"
        check_numbers(user, place)
        check_effects(user, place)
        for key, other in contradicted(user, self.gradient_clipping, CLIPPING, self.offload):
            raise UserError(f'{place} {key} contradicts {other}; make them equal or write "auto"')

    def user_config_effects(self) -> Iterator[str]:
        """Yield a line for each key of the JSON that wins over a setting, or does nothing."""
        if self.deepspeed_config is not None:
            user = _user_config(self.deepspeed_config)
            for line in effects(user, self.gradient_clipping, self.offload):
                yield f"deepspeed_config {self.deepspeed_config}: {line}"


@dataclass(frozen=True, kw_only=True)
class EngineConfig(EngineSettings):
    """One training engine: the run's flags, its own ZeRO stage and batch, the dtype resolved."""

    zero_stage: int = setting(MISSING, "ZeRO stage", choices=ZERO_STAGES)
    micro_batch_size: int = setting(MISSING, "rows per device and pass", at_least=1)
    dtype: str = setting(MISSING, "what the engine computes in", choices=DTYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload and self.zero_stage == 0:
            raise UserError("offload needs ZeRO: give a zero_stage of 1, 2 or 3, or drop offload")


@changed("get_train_ds_config(EngineConfig(zero_stage=2, ...), world_size)", config=EngineConfig)
def get_train_ds_config(
    config: EngineConfig, world_size: int, trained_elements: int | None = None
) -> dict:
    """Build DeepSpeed's configuration of a training engine.

    Args:
        trained_elements: of all parameters that train. The buffers in which gradients are collected
            are then no larger: with adapters, megabytes in place of one or two times 500 million
            elements an engine. None: before they are known; nothing is trained by this config.

    Half precision at stage 0 runs as stage 1: the same mathematics, but gradients of several
    micro-batches add up in fp32, and fp16 losses are scaled (DeepSpeed 0.19's stage 0 divides by a
    loss scale that `engine.backward` never applied).

    The user's JSON, where there is one, is merged over it; see `ds_json`.
    """
    stage = 1 if config.zero_stage == 0 and config.dtype != "fp32" else config.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": stage in (2, 3),
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    if trained_elements is not None:
        zero["reduce_bucket_size"] = max(1, min(BUCKET, trained_elements))
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
    if config.deepspeed_config is None:
        return ours
    merged = _merged(ours, config.deepspeed_config, config)
    _check_shards(merged["zero_optimization"], config.deepspeed_config, world_size)
    return merged


@changed('get_eval_ds_config("bf16", offload=False)', dtype=str, offload=bool)
def get_eval_ds_config(dtype: str, offload: bool = False) -> dict:
    """Build DeepSpeed's configuration of a frozen model under ZeRO-3.

    Frozen models at lower stages need no engine.

    Args:
        dtype: fp32, bf16 or fp16. offload: keep the parameters on the CPU.
    """
    zero: dict[str, Any] = {"stage": 3}
    if offload:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": zero,
        **_precision(dtype),
    }


def _precision(dtype: str) -> dict:
    if dtype == "bf16":
        return {"bf16": {"enabled": True}}
    if dtype == "fp16":
        return {"fp16": {"enabled": True, "loss_scale_window": 100}}
    return {}


def _merged(ours: dict, path: str, config: EngineConfig) -> dict:
    """Merge the DeepSpeed JSON at `path` over `ours`, key by key; "auto" keeps our value.

    Raises:
        UserError: the file is missing or not JSON; it holds a scheduler block (one schedule would
            write one rate into all groups and level B's rate to A's); it contradicts a setting that
            the training loop depends on (batch sizes, accumulation, precision, ZeRO stage); a key
            or a value that the installed DeepSpeed does not take; or it would have DeepSpeed
            unpickle files.
    """
    user = _user_config(path)
    merged = copy.deepcopy(ours)
    merge_into(merged, user, f"deepspeed_config {path}:")
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    conflicts = {key: f"the settings' {ours[key]}" for key in sizes if merged[key] != ours[key]}
    for key in ("bf16", "bfloat16", "fp16"):
        if _enabled(merged, key) != _enabled(ours, key):
            conflicts[key] = f"dtype {config.dtype}"
    zero = user.get("zero_optimization", "auto")
    stage = "auto" if zero == "auto" else zero.get("stage", "auto")
    # Not `ours`, which runs half precision at stage 0 as stage 1.
    if stage not in ("auto", config.zero_stage):
        conflicts["zero_optimization"] = f"zero_stage {config.zero_stage}"
    for key, setting_value in conflicts.items():
        raise UserError(
            f"deepspeed_config {path}: {key} {user[key]} contradicts {setting_value}; make them "
            'equal or write "auto"'
        )
    merged["zero_optimization"]["stage"] = ours["zero_optimization"]["stage"]
    check_known(merged, user, f"deepspeed_config {path}:")
    if merged.get("checkpoint", {}).get("load_universal"):
        raise UserError(
            f"deepspeed_config {path}: checkpoint: load_universal would run code that a file of "
            "the checkpoint holds; remove it, and convert by python -m dschat.checkpoint convert"
        )
    return merged


def _check_shards(zero: dict, path: str, world_size: int) -> None:
    """Refuse kinds of shards that DeepSpeed does not make of these models.

    Raises:
        UserError: a machine's shards that do not divide the ranks; frozen weights in 8 bits, which
            DeepSpeed 0.19 leaves as they are where a model is sharded before its base is frozen.
    """
    place = f"deepspeed_config {path}: zero_optimization:"
    near = zero.get("zero_hpz_partition_size", 1)
    if near > 1 and world_size % min(near, world_size):
        raise UserError(
            f"{place} zero_hpz_partition_size {near} does not divide the {world_size} processes; "
            "give the number of GPUs of a machine"
        )
    if zero.get("zero_quantized_nontrainable_weights"):
        raise UserError(
            f"{place} zero_quantized_nontrainable_weights does nothing to models that load in "
            "shards; use quantize_base at zero_stage 0, 1 or 2, or zero_quantized_weights"
        )


def _user_config(path: str) -> dict:
    """Read the user's JSON, which must leave the schedule to the settings."""
    user = read_user_config(path)
    if "scheduler" in user:
        raise UserError(
            f"deepspeed_config {path}: remove the scheduler block, it would write one rate into "
            "every group and undo loraplus_lr_ratio; use lr_scheduler_type and num_warmup_steps"
        )
    return user


def _enabled(config: dict, key: str) -> bool:
    block = config.get(key, False)
    return bool(block.get("enabled", False) if isinstance(block, dict) else block)


__getattr__ = moved(
    __name__,
    {
        "GLOBAL_BATCH_SIZE": "computed from EngineConfig",
        "MICRO_BATCH_SIZE": "the field micro_batch_size of EngineConfig",
    },
)
