"""Actor and critic folders, prompts and roles of tiny size, for the tests and their ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dschat.data.batches import PromptBatch
from dschat.models.reward_model import RewardModel
from dschat.models.save import save_hf_format
from dschat.rlhf.experience import Experience
from dschat.rlhf.part_config import EMAConfig, RewardConfig, SamplingConfig
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer
from dschat.rlhf.rewards import Rewards
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.role_setup import FrozenConfig, RoleConfig, RoleSetup
from dschat.train.model_config import ModelConfig
from dschat.utils.distributed import Distributed
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import schedule_factory
from tests.helpers import tiny
from tests.helpers.adapters import ALONE
from tests.helpers.rounding import adam_tolerance, weight_rtol

MODELS = {
    "llama": tiny.tiny_llama,
    "gpt2": tiny.tiny_gpt2,
    "opt": tiny.tiny_opt,
    "falcon": tiny.tiny_falcon,
}
DROPOUTS = {
    "llama": ("attention_dropout",),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "opt": ("dropout", "attention_dropout"),
    "falcon": ("hidden_dropout", "attention_dropout"),
}
FULL = LoraConfig()  # no adapters: all weights train
LORA = LoraConfig(lora_dim=4, lora_alpha=8.0, lora_dropout=0.5)
# Adam divides by |g| + eps: with a tiny eps it would turn rounding of the smallest gradients into
# whole steps, and forgive any common factor on the others.
EPS = 1e-3


@dataclass(frozen=True)
class Folders:
    """Where actor and critic of one family lie."""

    actor: Path
    critic: Path


def with_dropout(model: PreTrainedModel, family: str) -> PreTrainedModel:
    """The same weights; whoever loads its folder gets dropout 0.5 everywhere."""
    for name in DROPOUTS[family]:
        setattr(model.config, name, 0.5)
    return model


def save_folders(folder: Path, family: str = "llama") -> Folders:
    """An actor and a reward model of different weights, both with dropout in their configs."""
    tokenizer = tiny.byte_tokenizer()
    actor = with_dropout(MODELS[family](seed=0), family)
    actor.save_pretrained(folder / "actor")
    tokenizer.save_pretrained(folder / "actor")
    torch.manual_seed(1)
    reward = RewardModel(with_dropout(MODELS[family](seed=1), family).base_model)
    save_hf_format(reward, tokenizer, folder / "critic", ALONE)
    return Folders(folder / "actor", folder / "critic")


@dataclass(frozen=True)
class Setting:
    """How both roles train; each test states only what it changes."""

    lora: LoraConfig = FULL
    dtype: str = "fp32"
    zero_stage: int = 0
    micro_batch: int = 4
    accumulation: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = 3e-3
    eps: float = EPS
    clipping: float = 1.0
    offload_frozen: bool = False
    train_base: bool = False
    ema: EMAConfig | None = None
    share_trunk: str = "auto"
    seed: int = 7

    def role(self, folder: Path) -> RoleConfig:
        """One role of this setting."""
        return RoleConfig(
            model=str(folder),
            engine=EngineConfig(
                zero_stage=self.zero_stage,
                dtype=self.dtype,
                micro_batch_size=self.micro_batch,
                gradient_accumulation_steps=self.accumulation,
                gradient_clipping=self.clipping,
            ),
            config=ModelConfig(
                optimizer=OptimizerConfig(self.learning_rate, eps=self.eps),
                lora=self.lora,
                train_base=self.train_base,
                gradient_checkpointing=self.gradient_checkpointing,
            ),
            schedule=schedule_factory("constant", 0, 100),
            offload_frozen=self.offload_frozen,
        )

    def role_setup(self, folders: Folders) -> RoleSetup:
        """All roles, the reward model from the critic's folder."""
        return RoleSetup(
            actor=self.role(folders.actor),
            critic=self.role(folders.critic),
            reward=self.frozen(folders.critic),
            share_trunk=self.share_trunk,
        )

    def frozen(self, folder: Path) -> FrozenConfig:
        """A reward model from a folder."""
        return FrozenConfig(str(folder), self.zero_stage, self.dtype, self.offload_frozen)

    def load(
        self, folders: Folders, distributed: Distributed, **changes: object
    ) -> DeepSpeedRLHFEngine:
        """All roles, with `changes` of the setup; the adapters' start is the same every time."""
        torch.manual_seed(self.seed)
        setup = replace(self.role_setup(folders), **changes)
        return DeepSpeedRLHFEngine.load(setup, tiny.byte_tokenizer(), distributed, self.ema)


def without_critic(roles: DeepSpeedRLHFEngine) -> DeepSpeedRLHFEngine:
    """The same roles for RLOO and GRPO; the reward model must be a copy of its own."""
    assert roles.reward is not None
    roles.critic = None
    return roles


def ppo_trainer(
    roles: DeepSpeedRLHFEngine, setting: Setting, world_size: int = 1, **changes: object
) -> DeepSpeedPPOTrainer:
    """A trainer whose batches fit the setting."""
    rewards = Rewards(RewardConfig(reward_clip=changes.pop("reward_clip", 5.0)))
    config = PPOConfig(
        SamplingConfig(changes.pop("answer", 6)),
        per_device_training_batch_size=setting.micro_batch,
        **{"per_device_generation_batch_size": 4, **changes},
    )
    return DeepSpeedPPOTrainer(roles, config, world_size, rewards=rewards, seed=5)


def left_padded(rows: list[list[int]], width: int | None = None) -> PromptBatch:
    """Prompts as rollouts take them, as wide as the longest or as asked."""
    ids, mask = tiny.padded([row[::-1] for row in rows], width)
    return PromptBatch(ids.flip(1), mask.flip(1), torch.ones(len(rows), dtype=torch.bool))


def prompts(count: int = 4, seed: int = 0, width: int | None = None) -> PromptBatch:
    """Prompts of 5 to 13 tokens without end tokens."""
    return left_padded([row[:-1] for row in tiny.token_rows(count, seed)], width)


def end_after(module: nn.Module, lengths: list[int | None]) -> RemovableHandle:
    """Make row i of one generation end with its `lengths[i]`-th token (None: never)."""
    calls = []

    def force(_, args, kwargs, output):
        if not kwargs["use_cache"]:
            return output  # a scoring pass
        calls.append(None)
        for row, length in enumerate(lengths):
            output.logits[row, -1, tiny.EOS] = 1e4 if length == len(calls) else -1e4
        return output

    return module.register_forward_hook(force, with_kwargs=True)


LENGTHS = [2, 6, 1, None]  # of the answers in a rollout; None runs out of room


def rollout(trainer: DeepSpeedPPOTrainer, seed: int = 0, lengths: list | None = None) -> Experience:
    """Sampled answers whose ends are put where a test needs them."""
    torch.manual_seed(seed)
    hook = end_after(trainer.roles.actor.module, lengths or LENGTHS)
    (e,) = trainer.rollout([prompts(seed=seed)], answers_per_prompt=1)
    hook.remove()
    return e


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_same(one: dict, other: dict, tolerance: float) -> None:
    """The same names, and tensors that differ nowhere by more."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_trained_alike(one: dict, other: dict, setting: Setting, steps: int) -> None:
    """The same weights but for rounding, after so many steps of this setting on either side."""
    assert one.keys() == other.keys()
    ratio = OptimizerConfig().loraplus_lr_ratio
    for name, value in one.items():
        rate = setting.learning_rate * (ratio if name.endswith("lora_B") else 1.0)
        torch.testing.assert_close(
            value,
            other[name],
            atol=adam_tolerance([rate] * steps, setting.eps, setting.clipping),
            rtol=weight_rtol(steps),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def largest_change(before: dict, after: dict) -> float:
    """The largest absolute difference of any element."""
    return max((after[name] - value).abs().max().item() for name, value in before.items())
