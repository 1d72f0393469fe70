"""Load causal language models from a folder or a hub id."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from dschat.errors import UserError, brief
from dschat.models.config import build_causal_lm, load_config, on_meta, set_dropout
from dschat.models.vocabulary import check_vocabulary, grow_vocabulary
from dschat.models.weight_files import DISK_HEAD, HEAD, check_weight_files
from dschat.utils import zero
from dschat.utils.distributed import all_reduce_sum
from dschat.utils.module.adapter_config import REWARD
from dschat.utils.module.adapter_merge import merge_adapter
from dschat.utils.module.model_source import resolve_model
from dschat.utils.predecessor import changed


def check_context(model_name_or_path: str, tokens: int, settings: str) -> None:
    """Stop when sequences may grow longer than the positions that the model has.

    Args:
        tokens: of the longest sequence. settings: names of those that limit it, for the message.

    Raises:
        UserError: with the model's own limit.
    """
    limit = getattr(load_config(model_name_or_path), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise UserError(
            f"{settings}: sequences of {tokens} tokens, but model {model_name_or_path} has {limit} "
            f"positions; give at most {limit}"
        )


def check_model_folder(model_name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop at a model that cannot be loaded; reads config and headers of its folder, no weights.

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


class Loadable(Protocol):
    """A model class of transformers, or an Auto class."""

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Load a model, and with `output_loading_info` a report as well."""


def load_weights(
    model_class: Loadable, name: str, *, state_dict: dict | None = None, **options: Any
) -> tuple[PreTrainedModel, dict]:
    """Load a model, and the report that `check_loading` reads.

    Args:
        state_dict: in place of files.

    Raises:
        UserError: there are no weights under this name, or its config makes no model.
    """
    try:
        return model_class.from_pretrained(
            name if state_dict is None else None,
            **({} if state_dict is None else {"state_dict": state_dict}),
            **options,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # to be reported by `check_loading`
            output_loading_info=True,
        )
    except OSError as error:
        raise UserError(f"model {name}: {brief(error)}") from error
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError):
        on_meta(name, build_causal_lm)  # says what is wrong with its config
        raise


def check_loading(name: str, info: dict, allowed_unexpected: tuple[str, ...] = ()) -> None:
    """Stop unless checkpoint and architecture have the same keys and shapes."""
    unexpected = [
        k for k in info["unexpected_keys"] if not k.startswith(allowed_unexpected or "\0")
    ]
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(unexpected),
        "mismatched": sorted(str(k) for k in info["mismatched_keys"]),
    }
    lines = [f"{kind} {', '.join(keys[:4])}" for kind, keys in problems.items() if keys]
    if lines:
        total = sum(len(keys) for keys in problems.values())
        raise UserError(
            f"model {name}: weights do not fit the architecture ({total} keys: {'; '.join(lines)})"
        )


@torch.no_grad()
def check_finite(model: nn.Module, name: str) -> None:
    """Stop at weights with NaN or infinity in them; one pass over them, on every rank.

    Raises:
        UserError: naming the tensors.
    """
    names: list[str] = []
    broken: list[float] = []
    for parameter_name, parameter in model.named_parameters():
        names.append(parameter_name)
        broken.append(float(not torch.isfinite(zero.local_values(parameter)).all()))
    if any(zero.is_partitioned(parameter) for parameter in model.parameters()):
        broken = all_reduce_sum(broken)  # a rank sees its own shards alone
    found = [name for name, is_broken in zip(names, broken, strict=True) if is_broken]
    if found:
        raise UserError(
            f"model {name}: NaN or infinity in {len(found)} of its {len(names)} tensors "
            f"({found[0]}); all it computes would be NaN, give an earlier or another copy"
        )


def adopt_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the model's configs agree with the tokenizer on padding and on the end of an answer."""
    set_special_tokens(model.config, tokenizer)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.pad_token_id = tokenizer.pad_token_id
        generation.eos_token_id = tokenizer.eos_token_id


def set_special_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set padding and end token; padding that is the end token is left out.

    Readers of the config take that id for padding wherever it stands: the end token's embedding
    would not train, and a classifier on this model would score the token before the end.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    for part in (config, config.get_text_config()):
        part.eos_token_id = end
        part.pad_token_id = None if pad == end else pad


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
    """Tell whether the forward has this parameter (ALiBi models have no `position_ids`)."""
    return name in inspect.signature(unwrap(model).forward).parameters


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside a DeepSpeed engine, or the module itself."""
    return getattr(model, "module", model)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Have a model in eval mode for the block, and then as it was; inside an engine or alone.

    DeepSpeed's engine passes `train()` and `eval()` on, and itself says that it trains, always.
    """
    was_training = unwrap(model).training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load report and bars: `check_loading` reports what matters."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
