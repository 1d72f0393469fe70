"""Load causal language models from a folder or a hub id."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dschat.errors import UserError
from dschat.models.config import load_config, set_dropout
from dschat.models.loading import (
    adopt_special_tokens,
    check_finite,
    check_loading,
    load_weights,
    quiet_transformers,
)
from dschat.models.vocabulary import check_vocabulary, grow_vocabulary
from dschat.models.weight_files import DISK_HEAD, HEAD, check_weight_files
from dschat.utils import zero
from dschat.utils.module.adapter_config import REWARD
from dschat.utils.module.adapter_merge import merge_adapter
from dschat.utils.module.model_source import resolve_model
from dschat.utils.predecessor import changed


def check_context(model_name_or_path: str, tokens: int, settings: str) -> None:
    """Raise an error when sequences may grow longer than the positions that the model has.

    Args:
        tokens: of the longest sequence. settings: names of those that limit it, for the message.

    Raises:
        UserError: with the model's own limit.
    """
    check_positions(load_config(model_name_or_path), model_name_or_path, tokens, settings)


def check_positions(config: PretrainedConfig, name: str, tokens: int, settings: str) -> None:
    """Do as `check_context` by the model's config."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise UserError(
            f"{settings}: sequences of {tokens} tokens, but model {name} has {limit} positions; "
            f"give at most {limit}"
        )


def check_model_folder(model_name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that cannot be loaded; reads config and headers of its folder, no weights.

    Raises:
        UserError: naming the file and the remedy.
    """
    config = load_config(model_name_or_path)
    check_weight_files(model_name_or_path)
    if not resolve_model(model_name_or_path).adapters:  # which may hold larger tables
        vocabulary = config.get_text_config().vocab_size
        check_vocabulary(model_name_or_path, vocabulary, len(tokenizer))


@changed(
    "create_hf_model(model_name_or_path, tokenizer, torch.bfloat16, ds_config=None)",
    model_name_or_path=str,
    dtype=torch.dtype,
)
def create_hf_model(
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    *,
    ds_config: dict | None = None,
    dropout: float | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model, merge its adapters, make room for the tokenizer's tokens.

    Args:
        ds_config: the engine's DeepSpeed config; with ZeRO-3 the model is built partitioned.
        dropout: sets every dropout probability of the config; None keeps the config's own.
        attn_implementation: one of `attention.IMPLEMENTATIONS`; None leaves it to transformers.

    Raises:
        UserError: the folder holds no language model, or its weights do not fit its config or are
            not finite, or an adapter does not fit its base.
    """
    config = load_config(model_name_or_path, dropout, attn_implementation)
    check_weight_files(model_name_or_path)
    source = resolve_model(model_name_or_path)
    adapters = source.read_adapters()
    for adapter in adapters:
        if adapter.is_reward:
            raise UserError(
                f"adapter {adapter.name}: is a reward model's ({REWARD}); give a language model"
            )
    with zero.init_context(ds_config), quiet_transformers():
        model, info = load_weights(AutoModelForCausalLM, source.base, config=config, dtype=dtype)
        if {DISK_HEAD, HEAD} & {*info["unexpected_keys"]}:
            raise UserError(
                f"model {source.label}: is a reward model (it holds a head); give a language model"
            )
        check_loading(source.label, info)
        for adapter in adapters:
            merge_adapter(model, adapter)
        grow_vocabulary(model, len(tokenizer))
    check_finite(model, model_name_or_path)
    if (generation := source.generation_config()) is not None:
        model.generation_config = generation
    adopt_special_tokens(model, tokenizer)
    return model


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the live module to 0; its config keeps its own values.

    PPO needs it: old and new log-probabilities must come from one function, and `eval()` would
    also switch gradient checkpointing off.
    """
    without: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = vars(module).get("config")
        is_layer = module is not model and not isinstance(module, PreTrainedModel)
        if is_layer and isinstance(config, PretrainedConfig):
            # Falcon's layers read their config at every pass.
            if id(config) not in without:
                without[id(config)] = copy.copy(config)
                set_dropout(without[id(config)], 0.0)
            vars(module)["config"] = without[id(config)]
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)


def position_ids_from(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count positions over real tokens only: (B, T) mask -> (B, T) int64, 0 under padding."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def forward_inputs(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> dict:
    """Build the keyword arguments of a forward pass; positions where the model takes them.

    Without a mask there are no positions either: the model counts them, and would look in given
    ones for packed sequences.
    """
    if attention_mask is None:
        return {"input_ids": input_ids}
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long()}
    if takes_argument(model, "position_ids"):
        inputs["position_ids"] = position_ids_from(attention_mask)
    return inputs


def takes_argument(model: nn.Module, name: str) -> bool:
    """Return whether the forward has this parameter (ALiBi models have no `position_ids`)."""
    return name in inspect.signature(unwrap(model).forward).parameters


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside a DeepSpeed engine, or the module itself."""
    return getattr(model, "module", model)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model, alone or in an engine, into eval mode for the block, then back.

    DeepSpeed's engine passes `train()` and `eval()` on, and itself says that it trains, always.
    """
    was_training = unwrap(model).training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
