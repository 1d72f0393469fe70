"""Settings of the rollout engine, checked against those of the actor and of PPO."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.errors import UserError
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.vllm_config import VLLMConfig
from dschat.settings import Settings, group, setting
from dschat.train.model_config import ModelConfig


@dataclass(frozen=True)
class RolloutConfig(Settings):
    """What samples the answers, and how."""

    rollout_engine: str = setting(
        "auto",
        "what samples the answers: generate of transformers, a static cache whose rows are "
        "refilled, or servers of vllm; auto: the static one where the model passes its proof",
        choices=("auto", "generate", "static", "vllm"),
    )
    vllm: VLLMConfig = group(VLLMConfig)
    gather_for_rollouts: bool = setting(
        False,
        "at actor_zero_stage 3: every rank holds the complete actor while it generates, in place "
        "of gathering each layer again for each token",
    )
    fuse_lora_for_generation: bool = setting(
        False, "fuse the actor's adapters with its weights while it generates"
    )

    def check(self, actor: ModelConfig, ppo: PPOConfig, *, train_base: bool) -> None:
        """Refuse settings that cannot be, or do nothing, with those of the actor and of PPO.

        Raises:
            UserError: naming the setting.
        """
        self._check_gathering(actor)
        self._check_fusing(actor)
        self.vllm.check(self.rollout_engine)
        if self.rollout_engine == "vllm":
            self._check_vllm(actor, ppo, train_base)

    def _check_gathering(self, actor: ModelConfig) -> None:
        stage = actor.zero_stage
        if self.gather_for_rollouts and stage != 3:
            raise UserError(
                f"gather_for_rollouts: at actor_zero_stage {stage} every rank holds complete "
                "weights already; drop gather_for_rollouts"
            )

    def _check_fusing(self, actor: ModelConfig) -> None:
        """Stop where the actor has no adapters to fuse, or no weights to fuse them with."""
        lora = actor.lora
        for is_obstacle, reason in (
            (lora.lora_dim == 0, "the actor has no adapters; add actor_lora_dim"),
            (
                actor.zero_stage == 3,
                "at actor_zero_stage 3 no rank holds a complete weight to fuse an adapter with; "
                "choose stage 0, 1 or 2",
            ),
            (
                lora.quantize_base is not None,
                "an adapter fused with the weights of actor_quantize_base "
                f"{lora.quantize_base} would be rounded away; drop actor_quantize_base",
            ),
        ):
            if self.fuse_lora_for_generation and is_obstacle:
                raise UserError(
                    f"fuse_lora_for_generation: {reason}, or drop fuse_lora_for_generation"
                )

    def _check_vllm(self, actor: ModelConfig, ppo: PPOConfig, train_base: bool) -> None:
        """Stop where servers would need more than LoRA's matrices, or where a setting idles."""
        filters = ppo.sampling
        lora, tokens = actor.lora, actor.trainable_tokens
        elsewhere = "it is for rollouts inside the trainer; drop it"
        for is_obstacle, name, reason in (
            (
                lora.lora_dim == 0,
                "actor_lora_dim 0",
                "servers are sent adapters, not a whole model; give actor_lora_dim",
            ),
            (
                train_base,
                "train_base_model",
                "servers are sent adapters, not a whole model; drop it",
            ),
            (lora.use_dora, "actor_use_dora", "vLLM reads no DoRA; drop it"),
            (
                bool(lora.modules_to_save),
                "actor_modules_to_save",
                "vLLM reads LoRA's matrices alone; drop it",
            ),
            (
                tokens not in (("auto",), ("none",)),
                "actor_trainable_tokens",
                "vLLM reads no rows of tokens; give none",
            ),
            (
                filters.top_p < 1 or filters.top_k > 0,
                "top_p and top_k",
                "a server tells log-probabilities of what they leave, not of the policy; drop them",
            ),
            (
                self.vllm.vllm_sleep and ppo.rollouts_ahead > 0,
                "vllm_sleep with rollouts_ahead",
                "servers cannot sleep while they sample ahead; drop one of the two",
            ),
            (self.gather_for_rollouts, "gather_for_rollouts", elsewhere),
            (self.fuse_lora_for_generation, "fuse_lora_for_generation", elsewhere),
            (
                ppo.generation_chunk_size > 0,
                "generation_chunk_size",
                "a server decides by itself how many answers grow at a time; drop it",
            ),
        ):
            if is_obstacle:
                raise UserError(
                    f"rollout_engine vllm, {name}: {reason}, or take another rollout_engine"
                )
