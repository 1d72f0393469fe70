"""A model's config, checked; and the model that it makes, without weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils import GENERATION_CONFIG_NAME

from dschat.errors import RepeatedKeyError, UserError, brief, parse_json
from dschat.models.attention import check_attention_dtype, choose_attention
from dschat.utils.bounded import TooMuchError, bounded
from dschat.utils.module.model_source import OWN_CODE, resolve_model, wants_own_code

_SECONDS, _BYTES = 120.0, 16e9  # for a config, or a model without weights: seconds at most
_ENDLESS = "the model of its config.json has no end"
_COUNT, _MOST = re.compile(r"(n|num)_(\w+_)?(layers?|experts)(_\w+)?"), 10_000
Build = Callable[[PretrainedConfig], nn.Module]


def load_config(
    model_name_or_path: str, dropout: float | None = None, attn_implementation: str | None = None
) -> PretrainedConfig:
    """Load the model's configuration, of an adapter that of its base.

    Args:
        dropout: replaces every dropout probability; None keeps them.
        attn_implementation: one of `attention.IMPLEMENTATIONS`; None keeps what transformers takes.

    Raises:
        UserError: no readable config, or that of another kind of model, or of one without such
            attention.
    """
    source = resolve_model(model_name_or_path)
    try:
        _check_keys(Path(source.base).expanduser() / "config.json")
        with bounded(_SECONDS, _BYTES, endless := f"model {source.label}: {_ENDLESS}"):
            config = AutoConfig.from_pretrained(source.base, trust_remote_code=False)
    except TooMuchError as error:
        raise UserError(f"{endless} (it takes {error}); copy the folder again") from error
    except (OSError, ValueError, AttributeError, StrictDataclassError) as error:
        if wants_own_code(error):
            raise UserError(f"model {source.label}: {OWN_CODE}") from error
        raise UserError(
            f"model {source.label}: no readable config.json ({brief(error)}); {source.remedy}"
        ) from error
    kind, text_model = f"{config.model_type!r}", "give a causal language model"
    if config.is_encoder_decoder:
        raise UserError(f"model {source.label}: {kind} has encoder and decoder; {text_model}")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"model {source.label}: {kind} writes no text; {text_model}")
    _check_counts(config, source.label)
    for folder in (Path(source.base).expanduser(), *(a.folder for a in source.adapters)):
        _check_generation(folder)
    _check_kernels(config, source.label)
    _check_quantised(config, source.label)
    if dropout is not None:
        set_dropout(config, dropout)
    if attn_implementation is not None:
        choose_attention(config, attn_implementation, source.label)
    return config


def _check_counts(config: PretrainedConfig, label: str) -> None:
    """Refuse numbers of layers or experts that no machine can build."""
    for name, value in config.get_text_config().to_dict().items():
        if isinstance(value, int) and _COUNT.fullmatch(name) and value > _MOST:
            raise UserError(
                f"model {label}: its config.json says {name} {value:,}, more than any model has; "
                "copy the folder again"
            )


def check_attention(attn_implementation: str | None, dtype: str, *names: str) -> None:
    """Refuse attention that these models do not have, or not in this dtype (fp32, bf16, fp16).

    Raises:
        UserError: naming what can be given instead.
    """
    check_attention_dtype(attn_implementation, dtype)
    for name in dict.fromkeys(names):
        load_config(name, attn_implementation=attn_implementation)


def _check_generation(folder: Path) -> None:
    """Refuse a generation_config.json that is there and cannot be read."""
    file = folder / GENERATION_CONFIG_NAME
    if not file.is_file():
        return
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever is in it
        raise UserError(
            f"{file} cannot be read ({brief(error, with_type=True)}); copy it again, or remove it"
        ) from error


def _check_kernels(config: PretrainedConfig, label: str) -> None:
    """Refuse a config that would have transformers fetch a kernel, which is code, from the hub."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        for kind in ("_attn_implementation", "_experts_implementation"):
            name = getattr(part, kind, None)
            if isinstance(name, str) and "/" in name:
                raise UserError(
                    f"model {label}: its config.json names the kernel {name!r}, and no code of a "
                    f"model is run; remove {kind.removeprefix('_')} from it"
                )


def _check_quantised(config: PretrainedConfig, label: str) -> None:
    """Refuse packed weights that cannot be read on this machine."""
    if getattr(config.get_text_config(), "quantization_config", None) is None:
        return
    try:
        get_hf_quantizer(copy.deepcopy(config), None, None, True, {})
    except Exception as error:  # each kind has its own
        raise UserError(
            f"model {label}: its weights are quantised, and cannot be read here ({brief(error)}); "
            "give the model that they were made of"
        ) from error


def build_causal_lm(config: PretrainedConfig) -> PreTrainedModel:
    """Build a causal language model of this shape with fresh weights."""
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check_kind(model_name_or_path: str) -> None:
    """Refuse a folder of another kind of model, before its tokenizer is blamed for it.

    Raises:
        UserError: as `load_config` does; a folder without a config is left to other checks.
    """
    if (Path(resolve_model(model_name_or_path).base).expanduser() / "config.json").is_file():
        load_config(model_name_or_path)


def _check_keys(file: Path) -> None:
    """Refuse a key that stands twice, of which JSON readers take the last in silence."""
    if not file.is_file():
        return
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except RepeatedKeyError as error:
        raise ValueError(f"{error.key!r} stands in it {error.count} times") from error
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")


def set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Set every dropout probability of the config, whatever the family calls it."""
    for name, value in config.to_dict().items():
        is_rate = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_rate and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, probability)


def on_meta(model_name_or_path: str, build: Build) -> nn.Module:
    """Build the module of a model's config on `meta`, without weights.

    Raises:
        UserError: the config makes no model.
    """
    config = load_config(model_name_or_path)
    endless = f"model {model_name_or_path}: {_ENDLESS}"
    try:
        with torch.device("meta"), bounded(_SECONDS, _BYTES, endless):
            return build(config)
    except UserError:
        raise
    except TooMuchError as error:
        raise UserError(f"{endless} (it takes {error}); copy the folder again") from error
    except Exception as error:  # whatever a value in the config leads to
        raise UserError(
            f"model {model_name_or_path}: its config.json makes no model "
            f"({brief(error, with_type=True)}); copy the folder again"
        ) from error
