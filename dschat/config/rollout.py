"""Flags of sampling and generation in step 3, beside those that DeepSpeed-Chat has."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.config.models import ModelConfig
from dschat.errors import UserError
from dschat.settings import Settings, setting
from dschat.utils.ds_utils import HybridConfig


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
    enable_hybrid_engine: bool = setting(
        False,
        "generate by DeepSpeed's inference kernels, if they agree with plain generation",
    )
    unpin_actor_parameters: bool = setting(
        False, "hybrid engine: gather ZeRO-3's weights layer by layer"
    )
    release_inference_cache: bool = setting(
        False, "hybrid engine: free its cache after each generation"
    )
    inference_tp_size: int = setting(1, "hybrid engine: ranks that generate as one")
    tp_gather_partition_size: int = setting(8, "hybrid engine: layers gathered at a time")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("inference_tp_size", "tp_gather_partition_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")
        if not self.enable_hybrid_engine:
            settings = {
                "unpin_actor_parameters": self.unpin_actor_parameters,
                "release_inference_cache": self.release_inference_cache,
                "inference_tp_size": self.inference_tp_size > 1,
                "tp_gather_partition_size": self.tp_gather_partition_size != 8,
            }
            for name in (name for name, given in settings.items() if given):
                raise UserError(
                    f"{name} is a setting of the hybrid engine: add --enable_hybrid_engine, "
                    "or drop the flag"
                )

    def fuses(self, actor: ModelConfig) -> bool:
        """Whether generation folds adapters in: on request, and for kernels that know none.

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
            if not self.enable_hybrid_engine:
                return False
            name = "enable_hybrid_engine with --actor_lora_dim"
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

    def hybrid(self, longest: int) -> HybridConfig | None:
        """DeepSpeed's settings for sequences of up to so many tokens; None when not asked for."""
        if not self.enable_hybrid_engine:
            return None
        return HybridConfig(
            max_out_tokens=longest,
            inference_tp_size=self.inference_tp_size,
            release_inference_cache=self.release_inference_cache,
            pin_parameters=not self.unpin_actor_parameters,
            tp_gather_partition_size=self.tp_gather_partition_size,
        )
