"""A transformer trunk with a scalar head: the reward model of step 2, the critic of step 3.

What `reward_folder` writes loads, any other sequence classifier of transformers with one label, and
DeepSpeed-Chat's `rwtransformer.` and `v_head.` keys.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dschat.errors import UserError
from dschat.models.causal_lm import forward_inputs
from dschat.models.config import load_config
from dschat.models.loading import (
    adopt_special_tokens,
    check_finite,
    check_loading,
    load_weights,
    misfits,
    quiet_transformers,
)
from dschat.models.reward_head import last_head, no_head
from dschat.models.reward_statistics import RewardStatistics
from dschat.models.shared_prompt import shared_prompt_inputs
from dschat.models.vocabulary import grow_vocabulary
from dschat.models.weight_files import (
    DISK_HEAD,
    HEAD,
    check_weight_files,
    read_bin,
    stored_head,
)
from dschat.utils import zero
from dschat.utils.module.adapter_merge import merge_adapter
from dschat.utils.module.model_source import ModelSource, resolve_model
from dschat.utils.predecessor import changed, changed_class

TRUNK = "rwtransformer"
HEADS = ("lm_head", "embed_out", DISK_HEAD, HEAD)  # that a trunk leaves in its folder


@changed_class("RewardModel(trunk)")
class RewardModel(nn.Module):
    """A trunk with a head: one value for every position; the score is the last real token's."""

    def __init__(self, base_model: PreTrainedModel):
        super().__init__()
        if hasattr(base_model, "encoder") and hasattr(base_model, "decoder"):
            raise UserError(
                f"reward model of type {base_model.config.model_type!r}: transformers has no trunk "
                "of its decoder alone; give a model of another family"
            )
        self.rwtransformer = base_model
        self.config = base_model.config
        width = head_width(self.config)
        self.v_head = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.v_head.weight, std=1.0 / math.sqrt(width + 1))
        self.v_head.to(base_model.dtype)
        self.reward_head: nn.Linear | None = None
        self.value_scaling: RewardStatistics | None = None  # units of the values

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> RewardModel:
        """Make a reward model of this shape with fresh weights.

        Raises:
            UserError: transformers has no trunk of this shape.
        """
        return cls(trunk_class(config)._from_config(config))

    def keep_reward_head(self) -> None:
        """Keep a frozen copy of the head: with adapters off, it gives the loaded model's scores."""
        self.reward_head = copy.deepcopy(self.v_head).requires_grad_(False)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_reward_head: bool = False,
        segments: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute values: (B, T) ids and bool mask -> (B, T) fp32, by `value_scaling` where set.

        Without a mask, as `right_padding.needed_mask` may give it, every token counts. With
        (B, T) `segments` and `position_ids` a row is a pair (`shared_prompt`).

        With `use_reward_head`, by the copy that `keep_reward_head` made, and never scaled. Both
        heads run whenever both exist: ZeRO-3 prefetches by the order of modules, which must not
        vary.
        """
        trunk = self.rwtransformer
        if segments is not None and position_ids is not None:
            inputs = shared_prompt_inputs(trunk, input_ids, segments, position_ids)
        else:
            inputs = forward_inputs(trunk, input_ids, attention_mask)
        hidden = trunk(**inputs, use_cache=False)[0]  # (B, T, H)
        values = self.v_head(hidden)
        if self.reward_head is not None:
            rewards = self.reward_head(hidden)
            values = rewards if use_reward_head else values
        values = values.squeeze(-1).float()
        if self.value_scaling is None or use_reward_head:
            return values
        return self.value_scaling.scaled(values)


def head_width(config: PretrainedConfig) -> int:
    """Width of the hidden states that the head reads.

    Raises:
        UserError: the config does not say.
    """
    text = config.get_text_config()
    width = getattr(text, "word_embed_proj_dim", None) or getattr(text, "hidden_size", None)
    if width is None:
        raise UserError(
            f"reward model of type {config.model_type!r}: its config has no hidden_size, the width "
            "that a head reads; give a model of another family"
        )
    return int(width)


def scores_at_end(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Select the value at each row's last real token: (B, T) values -> (B,) scores."""
    positions = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    last = (positions * attention_mask).argmax(dim=-1, keepdim=True)  # on either side of padding
    return values.gather(-1, last).squeeze(-1)


@changed(
    "create_critic_model(model_name_or_path, tokenizer, torch.bfloat16, ds_config=None)",
    dtype=torch.dtype,
)
def create_critic_model(
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    *,
    ds_config: dict | None = None,
    dropout: float | None = None,
    attn_implementation: str | None = None,
    init_head: bool = False,
) -> RewardModel:
    """Load a reward model from a folder or hub id; adapters are merged into the trunk.

    The adapter of a language model gives its trunk, that of a reward model its head as well.

    Args:
        init_head: True starts a fresh head on a model without one (step 2); False demands that the
            head is in the checkpoint (step 3, evaluation).

    Raises:
        UserError: the head is missing, keys are missing or unexpected, or files of weights cannot
            be used.
    """
    config = load_config(model_name_or_path, dropout, attn_implementation)
    check_weight_files(model_name_or_path)
    source = resolve_model(model_name_or_path)
    adapters = source.read_adapters()
    bin_state = read_bin(source.base)
    old_state = _predecessor_state(bin_state)
    head = old_state.pop(HEAD, None) if old_state else stored_head(source.base, bin_state)
    head = last_head(adapters, head)
    del bin_state
    if head is None and not init_head:
        raise UserError(no_head(model_name_or_path))
    with zero.init_context(ds_config), quiet_transformers():
        base = _load_trunk(source, config, dtype, old_state)
        for adapter in adapters:
            merge_adapter(base, adapter, trunk=base.base_model_prefix)
        grow_vocabulary(base, len(tokenizer))
    adopt_special_tokens(base, tokenizer)
    model = with_head(base, head, model_name_or_path)
    check_finite(model, model_name_or_path)
    return model


def _load_trunk(
    source: ModelSource,
    config: PretrainedConfig,
    dtype: torch.dtype,
    state_dict: dict[str, torch.Tensor] | None,
) -> PreTrainedModel:
    """Load a trunk, whose folder may hold an output head as well.

    Some families' language models name their head in a way of their own (`rwkv`), or have tensors
    that transformers renames rightly for the whole alone (`deepseek_v4`): where the trunk does not
    fit by itself, it is taken out of the language model.

    Raises:
        UserError: the weights do not fit, as the trunk's class reads them.
    """
    kind = trunk_class(config)
    shape: dict[str, Any] = {"config": config, "dtype": dtype}
    base, info = load_weights(kind, source.base, state_dict=state_dict, **shape)
    is_known = type(config) in AutoModelForCausalLM._model_mapping
    if misfits(info, HEADS) and state_dict is None and is_known:
        model, whole = load_weights(AutoModelForCausalLM, source.base, **shape)
        if type(model.base_model) is kind and not misfits(whole):
            return model.base_model
    check_loading(source.label, info, HEADS)
    return base


def trunk_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Look up the class of transformers that a reward model of this shape is built on.

    Raises:
        UserError: there is none, or it comes with an output head.
    """
    mapping = AutoModel._model_mapping
    trunk = class_for(mapping, config) if type(config) in mapping else None
    if trunk is None or issubclass(trunk, GenerationMixin):
        raise UserError(
            f"reward model of type {config.model_type!r}: transformers has no trunk without an "
            "output head for it; give a model of the family that reads text alone"
        )
    return trunk


def class_for(mapping: Mapping[type, Any], config: PretrainedConfig) -> type[PreTrainedModel]:
    """Look up the class of a config; a mapping of transformers may hold several for one."""
    classes = mapping[type(config)]
    return classes[0] if isinstance(classes, tuple) else classes


def with_head(base: PreTrainedModel, head: torch.Tensor | None, name: str) -> RewardModel:
    """Put a (1, width) head on a loaded trunk; None starts a fresh one.

    Raises:
        UserError: the head is of another width.
    """
    model = RewardModel(base)
    if head is not None:
        if head.shape != model.v_head.weight.shape:
            raise UserError(
                f"reward model {name}: head of shape {tuple(head.shape)} does not fit "
                f"{tuple(model.v_head.weight.shape)}"
            )
        with torch.no_grad():
            model.v_head.weight.copy_(head)
    return model


def _predecessor_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """DeepSpeed-Chat's reward checkpoint, trunk keys without prefix; None for another's."""
    if not any(key.startswith(f"{TRUNK}.") for key in state):
        return None
    return {key.removeprefix(f"{TRUNK}."): tensor for key, tensor in state.items()}
