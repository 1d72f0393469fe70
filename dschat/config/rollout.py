"""Flags of sampling and generation in step 3, beside those that DeepSpeed-Chat has."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.errors import UserError
from dschat.settings import Settings, setting
from dschat.train.run_config import ModelConfig

_NO_KERNELS = "DeepSpeed's inference kernels fit no model of today; transformers generates"


@dataclass(frozen=True)
class RolloutArguments(Settings):
    """How answers are generated."""

    answers_per_prompt: int = setting(1, "answers sampled for each prompt")
    generation_chunk_size: int = setting(
        0,
        "answers that a device generates at a time, of prompts of like length; "
        "0: all answers to as many prompts as per_device_generation_batch_size",
    )
    min_answer_seq_len: int = setting(0, "tokens before which the end token is not sampled")
    stop_strings: tuple[str, ...] = setting((), "texts that end an answer, beside the end token")
    fuse_lora_for_generation: bool = setting(
        False, "fold the actor's adapters into its weights while it generates"
    )
    enable_hybrid_engine: bool = setting(False, _NO_KERNELS, retired=True)
    unpin_actor_parameters: bool = setting(False, _NO_KERNELS, retired=True)
    release_inference_cache: bool = setting(False, _NO_KERNELS, retired=True)
    inference_tp_size: int = setting(1, _NO_KERNELS, retired=True)
    tp_gather_partition_size: int = setting(8, _NO_KERNELS, retired=True)

    def fuses(self, actor: ModelConfig) -> bool:
        """Whether generation folds adapters in.

        Raises:
            UserError: it should and cannot; the message says what to drop.
        """
        name = "fuse_lora_for_generation"
        if actor.lora.lora_dim == 0:
            if self.fuse_lora_for_generation:
                raise UserError(
                    f"{name}: the actor has no adapters; add --actor_lora_dim, or drop the flag"
                )
            return False
        if not self.fuse_lora_for_generation:
            return False
        if actor.zero_stage == 3:
            raise UserError(
                f"{name}: with --actor_zero_stage 3 no rank holds a whole weight to fold an "
                "adapter into; choose stage 0, 1 or 2, or drop the flag"
            )
        if actor.lora.quantize_base is not None:
            raise UserError(
                f"{name}: an adapter folded into the weights of --actor_quantize_base "
                f"{actor.lora.quantize_base} would be rounded away; drop one of the two"
            )
        return True
