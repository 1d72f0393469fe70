"""Settings of step 3."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.config.data import check_streaming
from dschat.errors import UserError
from dschat.rlhf.run_settings import PPORunSettings
from dschat.settings import setting

NO_KERNELS = "DeepSpeed's inference kernels fit no model of today; transformers generates"


@dataclass(frozen=True)
class RLHFSettings(PPORunSettings):
    """Step 3, PPO."""

    enable_mixed_precision_lora: bool = setting(
        False, "ZeRO-3 keeps its own precision", retired=True
    )
    align_overflow: bool = setting(False, "each engine skips its own overflows", retired=True)
    num_padding_at_beginning: int = setting(1, "masks come from lengths", retired=True)
    enable_hybrid_engine: bool = setting(False, NO_KERNELS, retired=True)
    unpin_actor_parameters: bool = setting(False, NO_KERNELS, retired=True)
    release_inference_cache: bool = setting(False, NO_KERNELS, retired=True)
    inference_tp_size: int = setting(1, NO_KERNELS, retired=True)
    tp_gather_partition_size: int = setting(8, NO_KERNELS, retired=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_streaming(self.data, self.run, self.max_steps)
        rounds = self.ppo.policy.dynamic_sampling_rounds
        if rounds and self.data.streaming:
            raise UserError(
                f"dynamic_sampling_rounds is {rounds}, but a stream cannot be read from two "
                "places: drop streaming, or dynamic_sampling_rounds"
            )
