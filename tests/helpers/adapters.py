"""Adapters of every kind on tiny models, ours and PEFT's, for the tests of their files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dschat.models.reward_model import RewardModel, scores_at_end
from dschat.models.save_plan import SavePlan, plan_saving
from dschat.utils.distributed import Distributed
from dschat.utils.module.lora import convert_linear_layer_to_lora, only_optimize_lora_parameters
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers import tiny
from tests.helpers.rounding import LOGITS

ALONE = Distributed(0, 1, 0, torch.device("cpu"))
IDS, MASK = tiny.padded(tiny.token_rows(3, seed=8))
EMBEDDING = {"llama": "embed_tokens", "llama-tied": "embed_tokens", "gpt2": "wte"}
EMBEDDING["opt"] = "embed_tokens"
LAST_NORM = {"llama": "norm", "llama-tied": "norm", "gpt2": "ln_f", "opt": "final_layer_norm"}
ARCHITECTURES = tuple(EMBEDDING)


def options(kind: str, name: str) -> dict[str, object]:
    """A kind of adapter as our settings for one of `ARCHITECTURES`."""
    embedding = EMBEDDING[name]
    return {
        "plain": {"lora_alpha": 6.0},
        "rslora": {"lora_alpha": 2.5, "use_rslora": True},
        "dora": {"lora_alpha": 6.0, "use_dora": True},
        "random B": {"lora_init": "B"},
        "embedding": {"lora_module_name": ("all-linear", embedding)},
        "dora embedding": {"lora_module_name": (embedding, "fc", "proj"), "use_dora": True},
        "whole": {"modules_to_save": (LAST_NORM[name],)},
        "whole embedding": {"modules_to_save": (embedding, LAST_NORM[name])},
    }[kind]


def as_trained(model: nn.Module, seed: int = 1, size: float = 0.2) -> nn.Module:
    """The model with what requires a gradient moved away from its start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return model.eval()


def with_adapter(model: nn.Module, lora: LoraConfig, seed: int = 1) -> nn.Module:
    """Adapters on, base frozen, moved."""
    convert_linear_layer_to_lora(model, lora)
    return as_trained(only_optimize_lora_parameters(model, lora.modules_to_save), seed)


def save_base(folder: Path, name: str) -> str:
    """A model folder of one of `ARCHITECTURES`."""
    tiny.ARCHITECTURES[name]().save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return str(folder)


def plan(mode: str, base: str, lora: LoraConfig, output: Path) -> SavePlan:
    """Decide on saving as a step would."""
    return plan_saving(mode, base, lora, train_base=False, output_dirs=[output])


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    """(B, T, V)."""
    return model(input_ids=IDS, attention_mask=MASK.long()).logits


@torch.no_grad()
def scores_of(model: RewardModel) -> torch.Tensor:
    """(B,)."""
    return scores_at_end(model(IDS, MASK), MASK)


def assert_equal(found: torch.Tensor, expected: torch.Tensor, *, folded: bool = False) -> None:
    """Logits, values or scores, each within its rounding of the exact ones.

    Args:
        folded: one side has adapters in its weights, which rounds these once more.
    """
    torch.testing.assert_close(found, expected, rtol=0, atol=(2 + folded) * LOGITS)
