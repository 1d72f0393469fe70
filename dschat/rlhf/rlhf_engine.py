"""Roles of PPO: actor, reference, critic, reward model, and the actor's moving average.

Under LoRA two trunks serve all four: the reference is the actor with its adapters off, the reward
model is the critic's trunk with its adapters off and the head it was loaded with; `share_trunk`
can make that one trunk, or four. Without LoRA, reference and reward model are frozen copies. A
reward model of another folder than the critic's is a frozen copy as well, and may read other tokens
than the actor writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dschat.models.causal_lm import disable_dropout
from dschat.models.logprobs import answer_logprobs
from dschat.models.padding_proof import prove_padding
from dschat.models.reward_model import scores_at_end
from dschat.rlhf.ema import EMA
from dschat.rlhf.one_trunk import Models, OneTrunk, SeparateTrunks
from dschat.rlhf.part_config import EMAConfig
from dschat.rlhf.retokenise import Retokeniser
from dschat.rlhf.role_setup import FrozenConfig, RoleConfig, RoleSetup
from dschat.train.engine import Engine, build_engine, build_frozen, torch_dtype
from dschat.utils.distributed import Distributed
from dschat.utils.ds_utils import get_eval_ds_config, get_train_ds_config
from dschat.utils.module.lora import adapters_disabled
from dschat.utils.predecessor import changed_class, moved
from dschat.utils.zero import is_partitioned


@changed_class("DeepSpeedRLHFEngine.load(RoleSetup(...), tokenizer, distributed)")
@dataclass
class DeepSpeedRLHFEngine:
    """Builds and holds the roles; build with `DeepSpeedRLHFEngine.load`."""

    actor: Engine
    critic: Engine | None  # None: no critic is trained
    reference: nn.Module | None  # None: the actor with its adapters off
    reward: nn.Module | None  # None: the critic with its adapters off, or there is none
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    synced_gpus: bool  # ranks generate until all have ended, as shards of weights require
    ema: EMA | None = None
    retokenise: Retokeniser | None = None  # None: the reward model reads the actor's tokens

    @classmethod
    def load(
        cls,
        setup: RoleSetup,
        tokenizer: PreTrainedTokenizerBase,
        distributed: Distributed,
        ema: EMAConfig | None = None,
    ) -> DeepSpeedRLHFEngine:
        """Load every role; the actor's and critic's engines come with named groups.

        The trained roles come first: their adapters then start alike in every layout.

        Raises:
            UserError: weights that do not fit, or a model that sees padding.
        """
        dtype = torch_dtype(setup.actor.engine.dtype)
        one_trunk = setup.share_trunk == "all"
        models: Models = (
            OneTrunk(setup.actor.model, tokenizer, dtype, setup.attn_implementation)
            if one_trunk
            else SeparateTrunks(tokenizer, dtype, setup.attn_implementation)
        )
        actor = _actor(setup.actor, models, distributed)
        critic = None if setup.critic is None else _critic(setup, setup.critic, models, distributed)
        reference = reward = None
        if not setup.reference_is_actors:
            reference = _frozen(setup.reference, "lm", models, distributed)
        if setup.reward is not None and not setup.reward_is_critics:
            if setup.retokenise is not None:
                models = SeparateTrunks(setup.retokenise.reader, dtype, setup.attn_implementation)
            # The weights of one trunk are the actor's: they do not go to the CPU in between.
            config = replace(setup.reward, offload=False) if one_trunk else setup.reward
            reward = _frozen(config, "value", models, distributed)
        roles = cls(
            actor=actor,
            critic=critic,
            reference=reference,
            reward=reward,
            tokenizer=tokenizer,
            device=distributed.device,
            synced_gpus=setup.actor.engine.zero_stage == 3 and distributed.world_size > 1,
            ema=EMA(actor.module, ema.ema_decay) if ema is not None and ema.enable_ema else None,
            retokenise=setup.retokenise,
        )
        roles._prove_padding(setup)
        return roles

    def _prove_padding(self, setup: RoleSetup) -> None:
        """Refuse a model that sees padding; frozen roles but the reward's are of these models."""
        for name, engine in self.trained.items():
            prove_padding(engine, self.tokenizer, self.device, setup.trained[name].model, left=True)
        if self.reward is None or setup.reward is None:
            return
        reader = self.tokenizer if self.retokenise is None else self.retokenise.reader
        with on_device(self.reward, self.device) as reward:
            prove_padding(reward, reader, self.device, setup.reward.model, left=True)

    @property
    def has_reward_model(self) -> bool:
        """True where a model gives rewards, so that `reward_scores` may be called."""
        return self.reward is not None or (
            self.critic is not None and self.critic.module.reward_head is not None
        )

    @property
    def trained(self) -> dict[str, Engine]:
        """Engines of the trained roles by name."""
        engines = {"actor": self.actor, "critic": self.critic}
        return {name: engine for name, engine in engines.items() if engine is not None}

    def eval(self) -> DeepSpeedRLHFEngine:
        """Put the trained roles into scoring mode; the frozen ones never leave it."""
        for engine in self.trained.values():
            engine.eval()
        return self

    def train(self) -> DeepSpeedRLHFEngine:
        """Put the trained roles into training mode."""
        for engine in self.trained.values():
            engine.train()
        return self

    def reference_logprobs(
        self,
        sequences: torch.Tensor,
        attention_mask: torch.Tensor,
        answer_length: int,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """(B, A) fp32 log-probabilities under the policy that PPO started from."""
        text = sequences, attention_mask, answer_length
        if self.reference is None:
            with adapters_disabled(self.actor):
                return answer_logprobs(self.actor, *text, temperature=temperature).logprobs
        with on_device(self.reference, self.device) as reference:
            return answer_logprobs(reference, *text, temperature=temperature).logprobs

    def reward_scores(
        self, sequences: torch.Tensor, attention_mask: torch.Tensor, answer_length: int
    ) -> torch.Tensor:
        """(B,) fp32 scores of the sequences, at their last real token.

        Raises:
            ValueError: no model gives rewards.
        """
        if self.reward is None:
            if self.critic is None:
                raise ValueError("no role is a reward model")
            with adapters_disabled(self.critic):
                values = self.critic(sequences, attention_mask, use_reward_head=True)
            return scores_at_end(values, attention_mask)
        if self.retokenise is not None:
            sequences, attention_mask = self.retokenise(sequences, attention_mask, answer_length)
        with on_device(self.reward, self.device) as reward:
            return scores_at_end(reward(sequences, attention_mask), attention_mask)


def _actor(role: RoleConfig, models: Models, distributed: Distributed) -> Engine:
    ds_config = get_train_ds_config(role.engine, distributed.world_size)
    module = models.language_model(role.model, ds_config)
    return _trained(module, role, "step 3, actor", distributed)


def _critic(setup: RoleSetup, role: RoleConfig, models: Models, distributed: Distributed) -> Engine:
    ds_config = get_train_ds_config(role.engine, distributed.world_size)
    module = models.reward_model(role.model, ds_config, fresh_head=role.fresh_head)
    if setup.reward_is_critics:
        module.keep_reward_head()
    module.value_scaling = setup.value_scaling
    return _trained(module, role, "step 3, critic", distributed)


def _trained(module: nn.Module, role: RoleConfig, title: str, distributed: Distributed) -> Engine:
    engine = build_engine(
        module, role.engine, role.config, role.schedule, distributed.world_size, title
    )
    disable_dropout(engine.module)  # after that: adapters bring dropout of their own
    return engine


def _frozen(role: FrozenConfig, kind: str, models: Models, distributed: Distributed) -> nn.Module:
    sharded = role.zero_stage == 3
    ds_config = get_eval_ds_config(role.dtype, role.offload) if sharded else {}
    module = (
        models.language_model(role.model, ds_config)
        if kind == "lm"
        else models.reward_model(role.model, ds_config)
    )
    return build_frozen(
        module, role.dtype, distributed.device, sharded=sharded, offload=role.offload
    )


@contextlib.contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Move a frozen module that lives on the CPU to the device for the block.

    Its weights do not change, so the way back copies nothing: the device's copies are dropped.
    """
    tensors = [*module.parameters(), *module.buffers()]
    first = next(module.parameters())
    if first.device == device or is_partitioned(first):
        yield module
        return
    on_cpu = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device, copy=True, non_blocking=True)
    try:
        yield module
    finally:
        for tensor, data in zip(tensors, on_cpu, strict=True):
            tensor.data = data


__getattr__ = moved(
    __name__,
    {
        "log_init": "dschat.utils.distributed.print_rank_0",
    },
)
