"""Folders of an actor and a reward model that are adapters on one base, as LoRA runs leave them."""

from __future__ import annotations

from pathlib import Path

import torch

from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers.adapters import ALONE, plan, save_base, with_adapter
from tests.helpers.tiny import byte_tokenizer
from tests.rlhf.tiny_roles import Folders

SFT_LORA = LoraConfig(lora_dim=3, lora_alpha=2.0)
REWARD_LORA = LoraConfig(lora_dim=2, lora_alpha=3.0, use_rslora=True)


def save_one_base(folder: Path, family: str = "llama") -> Folders:
    """`base`, and on it the adapters `actor` and `critic`."""
    tokenizer, base = byte_tokenizer(), save_base(folder / "base", family)
    actor = with_adapter(create_hf_model(base, tokenizer, torch.float32), SFT_LORA)
    torch.manual_seed(3)
    critic = create_critic_model(base, tokenizer, torch.float32, init_head=True)
    critic = with_adapter(critic, REWARD_LORA, seed=2)
    for name, module, lora in (("actor", actor, SFT_LORA), ("critic", critic, REWARD_LORA)):
        out = folder / name
        save_hf_format(module, tokenizer, out, ALONE, plan("adapter", base, lora, out))
    return Folders(folder / "actor", folder / "critic")
