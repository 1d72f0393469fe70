"""Models of the roles: each loaded from its folder, or all as trees over one base's weights.

With one trunk every role is a tree of its own - layers, adapters, head - whose weights are the same
parameters. The adapter of its folder stays unmerged (`fixed_update.py`), and the trainable adapters
sit on top: disabling them restores the loaded model, as with separate trunks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.models.causal_lm import create_hf_model
from dschat.models.config import build_causal_lm, on_meta
from dschat.models.loading import adopt_special_tokens
from dschat.models.reward_head import read_head
from dschat.models.reward_model import RewardModel, create_critic_model, with_head
from dschat.utils.module.adapter_merge import fitting_updates
from dschat.utils.module.fixed_update import add_fixed_updates, check_can_stay_unmerged
from dschat.utils.module.model_source import ModelSource, resolve_model, same_model

FLAG = "share_trunk all"


class Models(Protocol):
    """Source of the roles' models."""

    def language_model(self, name: str, ds_config: dict) -> PreTrainedModel:
        """Load the causal LM of this name."""

    def reward_model(self, name: str, ds_config: dict, *, fresh_head: bool = False) -> RewardModel:
        """Load the reward model of this name; with a `fresh_head` of a language model's trunk."""


class SeparateTrunks:
    """Loads each model from its folder, with weights of its own."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        attn_implementation: str | None = None,
    ):
        self.tokenizer, self.dtype = tokenizer, dtype
        self.attn_implementation = attn_implementation

    def language_model(self, name: str, ds_config: dict) -> PreTrainedModel:
        """Load by `create_hf_model`."""
        return create_hf_model(
            name,
            self.tokenizer,
            self.dtype,
            ds_config=ds_config,
            attn_implementation=self.attn_implementation,
        )

    def reward_model(self, name: str, ds_config: dict, *, fresh_head: bool = False) -> RewardModel:
        """Load by `create_critic_model`."""
        return create_critic_model(
            name,
            self.tokenizer,
            self.dtype,
            ds_config=ds_config,
            attn_implementation=self.attn_implementation,
            init_head=fresh_head,
        )


class OneTrunk:
    """Makes trees of modules over the weights of one base, which is loaded once."""

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        attn_implementation: str | None = None,
    ):
        self.tokenizer = tokenizer
        base = resolve_model(name).base
        self._base = create_hf_model(
            base, tokenizer, dtype, attn_implementation=attn_implementation
        )

    def language_model(self, name: str, ds_config: dict) -> PreTrainedModel:
        """Make a tree that computes what `create_hf_model` loads, its adapters unmerged."""
        source, model = resolve_model(name), _tree(self._base)
        _add_adapters(model, source, trunk="")
        if (generation := source.generation_config()) is not None:
            model.generation_config = generation
            adopt_special_tokens(model, self.tokenizer)
        return model

    def reward_model(self, name: str, ds_config: dict, *, fresh_head: bool = False) -> RewardModel:
        """Make a tree that computes what `create_critic_model` loads, its adapters unmerged."""
        trunk = _tree(cast(PreTrainedModel, self._base.base_model))
        _add_adapters(trunk, resolve_model(name), trunk=self._base.base_model_prefix)
        return with_head(trunk, None if fresh_head else read_head(name), name)


def _tree(module: PreTrainedModel) -> PreTrainedModel:
    """Copy the modules around the same parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def _add_adapters(model: PreTrainedModel, source: ModelSource, trunk: str) -> None:
    adapters = source.read_adapters()
    add_fixed_updates(model, [fitting_updates(model, a, trunk) for a in adapters])


def check_one_trunk(names: Sequence[str]) -> None:
    """Raise an error when these models are not adapters on one base, or that base itself.

    Raises:
        UserError: two bases (both are named), an adapter that is more than low-rank updates, or
            that does not fit the base.
    """
    sources = [resolve_model(name) for name in names]
    for source in sources[1:]:
        if not same_model(source.base, sources[0].base):
            raise UserError(
                f"{FLAG}: {source.name} is on the base {source.base}, {sources[0].name} on "
                f"{sources[0].base}; train both as adapters on one base (lora_save adapter), or "
                "use share_trunk auto"
            )
    model = on_meta(names[0], build_causal_lm)
    assert isinstance(model, PreTrainedModel)
    if type(model.base_model) is not AutoModel._model_mapping[type(model.config)]:
        raise UserError(
            f"{FLAG}: {type(model).__name__} wraps its trunk in a way that a critic cannot share; "
            "use share_trunk auto"
        )
    for source in sources:
        for adapter in source.read_adapters():
            check_can_stay_unmerged(adapter, FLAG)
            if adapter.is_reward:
                fitting_updates(model.base_model, adapter, model.base_model_prefix)
            else:
                fitting_updates(model, adapter)
