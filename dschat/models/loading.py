"""Weights of a model folder: loaded, checked against the architecture, finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from dschat.errors import UserError, brief
from dschat.models.config import build_causal_lm, on_meta
from dschat.utils import zero
from dschat.utils.distributed import all_reduce_sum


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


def misfits(info: dict, allowed_unexpected: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """List the keys in which checkpoint and architecture differ, by kind; empty where they fit."""
    unexpected = [k for k in info["unexpected_keys"] if not k.startswith(allowed_unexpected)]
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(unexpected),
        "mismatched": sorted(str(k) for k in info["mismatched_keys"]),
    }
    return {kind: keys for kind, keys in problems.items() if keys}


def check_loading(name: str, info: dict, allowed_unexpected: tuple[str, ...] = ()) -> None:
    """Check that checkpoint and architecture have the same keys and shapes."""
    problems = misfits(info, allowed_unexpected)
    if problems:
        lines = [f"{kind} {', '.join(keys[:4])}" for kind, keys in problems.items()]
        total = sum(len(keys) for keys in problems.values())
        raise UserError(
            f"model {name}: weights do not fit the architecture ({total} keys: {'; '.join(lines)})"
        )


@torch.no_grad()
def check_finite(model: nn.Module, name: str) -> None:
    """Refuse weights with NaN or infinity in them; one pass over them, on every rank.

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
