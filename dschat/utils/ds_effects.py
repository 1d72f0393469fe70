"""The user's DeepSpeed JSON against the programs: what contradicts them, wins, or does nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dschat.errors import UserError

LARGEST = 2**63 - 1  # DeepSpeed counts elements, and sys.maxsize is one of its defaults
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
MAY_BE_NEGATIVE = {"module_depth"}  # of the profiler: down to the last layer
ABOVE_ZERO = {
    *("gradient_predivide_factor", "steps_per_print", "loss_scale_window", "min_loss_scale"),
    *("hysteresis", "profile_step", "top_modules", "block_size", "queue_depth", "buffer_count"),
    *("buffer_size", "zero_hpz_partition_size", "allgather_bucket_size", "intra_op_parallelism"),
    *("sub_group_size",),
}
# Blocks that act through parts of DeepSpeed that no program here uses.
OF_OTHER_PROGRAMS = {
    "activation_checkpointing": "layers are checkpointed by gradient_checkpointing",
    "autotuning": "DeepSpeed's own launcher reads it, with --autotuning",
    "compile": "no engine is compiled",
    "data_efficiency": "batches come from the library's own loaders",
    "dataloader_drop_last": "batches come from the library's own loaders",
    "pipeline": "no model is cut into pipeline stages",
    "use_data_before_expert_parallelism": "experts are not spread over ranks",
    "vocabulary_size": "the model's own embedding counts",
    "weight_quantization": "base weights are quantised by quantize_base",
}

# Blocks that would take over what the programs do themselves: their switch, and what to do instead.
# Some would write to any path that the JSON names, over whatever is there.
REFUSED = {
    "checkpoint": ("writer", "checkpoints are the programs' own; remove it"),
    "comet": ("enabled", "OUTPUT_DIR/metrics.jsonl has the figures; remove the block"),
    "csv_monitor": ("enabled", "OUTPUT_DIR/metrics.jsonl has the figures; remove the block"),
    "flops_profiler": ("output_file", "the profile goes to standard output; remove it"),
    "tensorboard": ("enabled", "give report_to and tensorboard_path; remove the block"),
    "wandb": ("enabled", "give report_to and wandb_project; remove the block"),
    "hybrid_engine": ("enabled", "generation is the programs' own; remove the block"),
    "torch_autocast": (
        "enabled",
        "scores would be of another precision than updates; give dtype",
    ),
    "tensor_parallel": (
        "autotp_size",
        "adapters and folders are of whole matrices; give zero_stage 3",
    ),
    "expert_parallel": ("enabled", "adapters and folders are of all experts; give zero_stage 3"),
}


def check_numbers(user: Mapping[str, Any], place: str) -> None:
    """Refuse numbers that DeepSpeed takes and cannot work with, in blocks of any depth.

    Parameters of an optimizer are tried by making it.

    Raises:
        UserError: what is negative, not finite, or zero where it divides.
    """
    for key, value in user.items():
        if isinstance(value, Mapping) and key != "optimizer":
            check_numbers(value, f"{place} {key}:")
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        least = -1 if key in MAY_BE_NEGATIVE else 0
        if not (least <= value <= LARGEST) or (value == 0 and key in ABOVE_ZERO):
            bound = "a number above 0" if key in ABOVE_ZERO else f"a number, {least} or more"
            bound = "at most 2^63 - 1" if value > LARGEST else bound
            raise UserError(f"{place} {key} is {value!r}: give {bound}")


def check_effects(user: Mapping[str, Any], place: str) -> None:
    """Refuse settings under which DeepSpeed does not do what the training loops rely on.

    Raises:
        UserError: it would.
    """
    if str(user.get("gradient_allreduce_op", "mean")).lower() not in ("mean", "auto"):
        raise UserError(
            f"{place} gradient_allreduce_op {user['gradient_allreduce_op']} would make updates "
            "depend on the number of processes, over which losses are means; remove it"
        )
    if user.get("managed_gradient_accumulation", "auto") not in (True, "auto"):
        raise UserError(
            f"{place} managed_gradient_accumulation false would step once a micro-batch; remove "
            "it, and give gradient_accumulation_steps"
        )
    if str(level := user.get("log_level") or "info").lower() not in (*LOG_LEVELS, "auto"):
        raise UserError(f"{place} log_level is {level!r}: give one of {', '.join(LOG_LEVELS)}")
    for block, (key, instead) in REFUSED.items():
        content = user.get(block)
        value = content.get(key, 0) if isinstance(content, Mapping) else 0
        if value is True or value not in (0, 1, False, None, "", "auto"):
            raise UserError(f"{place} {block}: {key} {value}: {instead}")


def contradicted(
    user: Mapping[str, Any], clipping: float, default_clipping: float, offload: bool
) -> Iterator[tuple[str, str]]:
    """Yield keys that contradict a setting which was given: the key, then the setting."""
    given = user.get("gradient_clipping", "auto")
    if given != "auto" and clipping not in (default_clipping, given):
        yield f"gradient_clipping {given}", f"gradient_clipping {clipping}"
    for key, device in _devices(user):
        if offload and device != "cpu":
            yield f"zero_optimization: {key} {device}", "offload, which is to the CPU"


def effects(user: Mapping[str, Any], clipping: float, offload: bool) -> Iterator[str]:
    """Yield a line for each key that wins over a setting, and for each that does nothing."""
    given = user.get("gradient_clipping", "auto")
    if given not in ("auto", clipping):
        yield f"gradient_clipping {given} in place of the setting's {clipping}"
    for key, device in _devices(user):
        if not offload and device != "none":
            yield f"zero_optimization: {key} to the {device}, without --offload"
    for key, reason in OF_OTHER_PROGRAMS.items():
        if user.get(key, "auto") not in ("auto", False):
            yield f"{key} does nothing: {reason}"


def _devices(user: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the offload blocks that the JSON holds, and their devices."""
    zero = user.get("zero_optimization")
    for key in ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param"):
        block = zero.get(key) if isinstance(zero, Mapping) else None
        if isinstance(block, Mapping) and block.get("device", "auto") != "auto":
            yield key, str(block["device"])
        elif isinstance(block, bool):  # the deprecated two
            yield key, "cpu" if block else "none"
