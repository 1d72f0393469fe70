"""A causal LM as trunk and output head, called as one model while the head scores in blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dschat.models.causal_lm import eval_mode, forward_inputs, unwrap
from dschat.models.head_blocks import HeadBlocks, Tensors
from dschat.utils.distributed import print_rank_0

T = TypeVar("T", torch.Tensor, tuple[torch.Tensor, ...])
PROBE = 100.0  # logits of this size show any scaling or capping


@dataclass(frozen=True)
class Split:
    """Causal LM as trunk and head: its logits are finish(head(trunk(inputs)))."""

    trunk: nn.Module
    head: nn.Module
    finish: Tensors
    vocabulary: int


def pass_through(
    model: nn.Module, split: Split, inputs: dict, score: Callable[[HeadBlocks, torch.Tensor], T]
) -> T:
    """Call the model once, its head scoring in blocks instead of making all logits.

    Two `forward`s are replaced for this call: the model's by trunk, then head; the head's by
    `blocks`, which scores the trunk's states block by block. Calling trunk and head directly would
    be simpler, but DeepSpeed's ZeRO-3 gathers and releases weights in hooks around the calls of
    modules, and expects them once and in the usual order, forwards and backwards, on every rank.
    So the model and its head are called as modules, hooks included, and compute something else.

    Args:
        score: of the head and the trunk's states (B, T, H); tensors alone.
    """
    one_block = split.head.forward
    trained = [p for p in split.head.parameters() if p.requires_grad]

    def blocks(states: torch.Tensor) -> T:
        logits = HeadBlocks(lambda x: split.finish(one_block(x)), split.vocabulary, trained)
        return score(logits, states)

    def trunk_then_head(**inputs: Any) -> T:
        return split.head(split.trunk(**inputs)[0])

    with _forward(unwrap(model), trunk_then_head), _forward(split.head, blocks):
        return model(**inputs, use_cache=False)


@contextlib.contextmanager
def _forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Replace what the module computes for the block; its hooks stay."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


_SPLITS: WeakKeyDictionary[nn.Module, Split | None] = WeakKeyDictionary()


def split_of(model: nn.Module, sequences: torch.Tensor) -> Split | None:
    """Find the model's trunk and head, proven once; None where its logits are more than these."""
    module = unwrap(model)
    if module in _SPLITS:
        known = _SPLITS[module]
        if known is None or known.head is _parts(module)[1]:  # else its head was replaced since
            return known
    _SPLITS[module] = split = _proven_split(model, sequences)
    if split is None:
        print_rank_0(
            f"{type(module).__name__}: its logits are not those of an output head on a trunk; "
            "logits of all tokens of a batch are kept"
        )
    return split


def assume_split(module: nn.Module) -> None:
    """Assume that the modules found are trunk and head, where no values can prove it."""
    trunk, head = _parts(module)
    if trunk is not None and head is not None:
        assert isinstance(module, PreTrainedModel)
        text = module.config.get_text_config()
        _SPLITS[module] = Split(trunk, head, _finish(text), text.vocab_size)


@torch.no_grad()
def _proven_split(model: nn.Module, sequences: torch.Tensor) -> Split | None:
    """Compare trunk, head and finish with the model's own forward pass over a few tokens.

    The head's input must be the trunk's output bit for bit; the head's output is replaced by
    logits from -PROBE to PROBE, which must come out as `finish` makes them.
    """
    module = unwrap(model)
    trunk, head = _parts(module)
    if trunk is None or head is None:
        return None
    seen: dict[str, torch.Tensor] = {}

    def probe(_, args: tuple, output: torch.Tensor) -> torch.Tensor:
        seen["states"] = args[0]
        line = torch.linspace(-PROBE, PROBE, output.shape[-1], device=output.device)
        seen["probe"] = line.to(output.dtype).expand(output.shape).contiguous()
        return seen["probe"]

    hooks = [
        trunk.register_forward_hook(lambda _, __, output: seen.update(trunk=output[0])),
        head.register_forward_hook(probe),
    ]
    ids = sequences[:1, -4:]
    try:
        inputs = forward_inputs(model, ids, torch.ones_like(ids, dtype=torch.bool))
        # Dropout would draw from the generator that the run's own draws come from.
        with eval_mode(model):
            actual = model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if not {"trunk", "probe"} <= seen.keys() or not torch.equal(seen["trunk"], seen["states"]):
        return None
    assert isinstance(module, PreTrainedModel)  # else it has no such parts
    finish, precision = _finish(module.config.get_text_config()), torch.finfo(actual.dtype).eps
    expected = finish(seen["probe"])
    if expected.shape != actual.shape:
        return None
    if not torch.allclose(expected.float(), actual.float(), rtol=4 * precision, atol=4 * precision):
        return None
    return Split(trunk, head, finish, actual.shape[-1])


def _parts(module: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Find what looks like trunk and output head; the trunk is not the model itself."""
    if not isinstance(module, PreTrainedModel) or not hasattr(module, "get_decoder"):
        return None, None
    trunk = module.get_decoder()
    return (trunk if trunk is not module else None), module.get_output_embeddings()


def _finish(config: PretrainedConfig) -> Tensors:
    """Scaling and capping of the head's output, by a family's own settings."""
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    divisor = getattr(config, "logits_scaling", None)  # Granite
    factor = getattr(config, "logit_scale", None)  # Cohere

    def finish(logits: torch.Tensor) -> torch.Tensor:
        if divisor is not None:
            logits = logits / divisor
        if isinstance(factor, float):
            logits = logits * factor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return finish
