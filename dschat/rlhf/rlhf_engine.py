"""The roles of PPO: actor, reference, critic, reward model, and the actor's moving average.

Under LoRA two trunks serve all four: the reference is the actor with its adapters off, the reward
model is the critic's trunk with its adapters off and the head it was loaded with. Without LoRA,
reference and reward model are frozen copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dschat.rlhf.ema import EMA
from dschat.rlhf.rollout import answer_logprobs
from dschat.utils.distributed import Distributed
from dschat.utils.ds_utils import EngineConfig, get_eval_ds_config, get_train_ds_config
from dschat.utils.engine import Recipe, Schedule, build_engine, build_frozen, torch_dtype
from dschat.utils.model.model_utils import create_hf_model, disable_dropout, unwrap
from dschat.utils.model.reward_model import create_critic_model, scores_at_end
from dschat.utils.module.lora import adapters_disabled
from dschat.utils.zero import is_partitioned


@dataclass(frozen=True)
class RoleConfig:
    """One trained role: where it comes from and how it trains."""

    model: str
    engine: EngineConfig
    recipe: Recipe
    schedule: Schedule
    offload_frozen: bool = False  # its frozen copy lives on the CPU between uses


@dataclass
class DeepSpeedRLHFEngine:
    """Builds and holds the roles; build with `DeepSpeedRLHFEngine.load`."""

    actor: nn.Module
    critic: nn.Module
    reference: nn.Module | None
    reward: nn.Module | None
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    generates_in_step: bool
    ema: EMA | None = None

    @classmethod
    def load(
        cls,
        actor: RoleConfig,
        critic: RoleConfig,
        tokenizer: PreTrainedTokenizerBase,
        distributed: Distributed,
        ema_decay: float | None = None,
    ) -> DeepSpeedRLHFEngine:
        """Load every role; the actor's and critic's engines come with named groups."""
        reference = (
            None if actor.recipe.base_is_frozen else _frozen(actor, "lm", tokenizer, distributed)
        )
        actor_engine = _trained(actor, "lm", tokenizer, distributed)
        reward = (
            None
            if critic.recipe.base_is_frozen
            else _frozen(critic, "value", tokenizer, distributed)
        )
        critic_engine = _trained(critic, "value", tokenizer, distributed)
        return cls(
            actor=actor_engine,
            critic=critic_engine,
            reference=reference,
            reward=reward,
            tokenizer=tokenizer,
            device=distributed.device,
            generates_in_step=actor.engine.zero_stage == 3 and distributed.world_size > 1,
            ema=EMA(actor_engine.module, ema_decay) if ema_decay is not None else None,
        )

    @property
    def has_reward_model(self) -> bool:
        """Whether `reward_scores` can be asked."""
        return self.reward is not None or unwrap(self.critic).reward_head is not None

    def eval(self) -> DeepSpeedRLHFEngine:
        """Scoring mode for the trained roles; the frozen ones never leave it."""
        self.actor.eval()
        self.critic.eval()
        return self

    def train(self) -> DeepSpeedRLHFEngine:
        """Training mode for the trained roles."""
        self.actor.train()
        self.critic.train()
        return self

    def reference_logprobs(
        self, sequences: torch.Tensor, attention_mask: torch.Tensor, answer_length: int
    ) -> torch.Tensor:
        """(B, A) fp32 log-probabilities under the policy that PPO started from."""
        if self.reference is None:
            with adapters_disabled(self.actor):
                return answer_logprobs(self.actor, sequences, attention_mask, answer_length)[0]
        with _on_device(self.reference, self.device) as reference:
            return answer_logprobs(reference, sequences, attention_mask, answer_length)[0]

    def reward_scores(self, sequences: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B,) fp32 scores of the whole sequences, at their last real token."""
        if self.reward is None:
            with adapters_disabled(self.critic):
                values = self.critic(sequences, attention_mask, use_reward_head=True)
            return scores_at_end(values, attention_mask)
        with _on_device(self.reward, self.device) as reward:
            return scores_at_end(reward(sequences, attention_mask), attention_mask)


def _load(
    role: RoleConfig, kind: str, tokenizer: PreTrainedTokenizerBase, ds_config: dict
) -> nn.Module:
    create = create_hf_model if kind == "lm" else create_critic_model
    dtype = torch_dtype(role.engine.dtype)
    return create(role.model, tokenizer, dtype, ds_config=ds_config)


def _trained(
    role: RoleConfig, kind: str, tokenizer: PreTrainedTokenizerBase, distributed: Distributed
) -> nn.Module:
    ds_config = get_train_ds_config(role.engine, distributed.world_size)
    module = _load(role, kind, tokenizer, ds_config)
    if kind == "value" and role.recipe.base_is_frozen:
        module.keep_reward_head()
    title = "step 3, actor" if kind == "lm" else "step 3, critic"
    engine = build_engine(
        module, role.engine, role.recipe, role.schedule, distributed.world_size, title
    )
    disable_dropout(engine.module)  # behind the recipe: adapters bring dropout of their own
    return engine


def _frozen(
    role: RoleConfig, kind: str, tokenizer: PreTrainedTokenizerBase, distributed: Distributed
) -> nn.Module:
    config = EngineConfig(
        zero_stage=3 if role.engine.zero_stage == 3 else 0,
        dtype=role.engine.dtype,
    )
    ds_config = get_eval_ds_config(config, role.offload_frozen) if config.zero_stage == 3 else {}
    module = _load(role, kind, tokenizer, ds_config)
    return build_frozen(module, config, distributed.device, offload=role.offload_frozen)


@contextlib.contextmanager
def _on_device(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The frozen module on the device; one that lives on the CPU goes back there afterwards."""
    home = next(module.parameters()).device
    if home == device or is_partitioned(next(module.parameters())):
        yield module
        return
    module.to(device)
    try:
        yield module
    finally:
        module.to(home)
