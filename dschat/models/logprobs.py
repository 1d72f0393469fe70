"""Log-probabilities of answers: the trunk in one pass, the output head in blocks of tokens.

A block's logits are at most `BLOCK_BYTES`; the backward pass makes them anew, block by block. So
no (B, T, V) tensor exists, and none over the prompt. `answer_logprobs` scores the last columns of a
batch, as generation makes them, `target_logprobs` the positions of a mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from dschat.functional.losses import token_entropy, token_logprobs
from dschat.models.causal_lm import forward_inputs, takes_argument, unwrap
from dschat.utils.distributed import print_rank_0

BLOCK_BYTES = 64 * 2**20  # of fp32 logits at one time
PROBE = 100.0  # logits of this size show any scaling or capping
Tensors = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AnswerScores:
    """Scores of answers under a policy; both are 0 where the attention mask is False."""

    logprobs: torch.Tensor  # (B, A) fp32, of the answers' tokens
    entropy: torch.Tensor | None  # (B, A) fp32 nats without gradient; None unless requested


def answer_logprobs(
    model: nn.Module,
    sequences: torch.Tensor,
    attention_mask: torch.Tensor,
    answer_length: int,
    *,
    with_entropy: bool = False,
    temperature: float = 1.0,
) -> AnswerScores:
    """Log-probabilities of the last `answer_length` tokens.

    Args:
        model: a causal LM or an engine around one; called once, whatever the answers' lengths.
        sequences: (B, P + A), prompts padded on the left. attention_mask: the same shape, bool.
        temperature: logits are divided by it, as in sampling.
    """
    split = _split_of(model, sequences)
    columns: Sequence[torch.Tensor]
    if split is None:
        columns = _from_logits(
            model, sequences, attention_mask, answer_length, temperature, with_entropy
        )
    else:
        targets = sequences[:, -answer_length:].flatten()  # (B * A,)

        def score(head: Tensors, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            before = states[:, -answer_length - 1 : -1].flatten(0, 1)  # (B * A, H)
            return _in_blocks(head, before, targets, split.vocabulary, temperature, with_entropy)

        inputs = forward_inputs(split.trunk, sequences, attention_mask)
        columns = _pass_through(model, split, inputs, score)
    # Padding was scored as well: the shapes of a pass, and with them its rounding, depend on the
    # batch's own shape alone, so that the first ratio of a rollout is 1 in every dtype.
    mask = attention_mask[:, -answer_length:]
    scores = [column.reshape(mask.shape).where(mask, 0.0) for column in columns]
    return AnswerScores(scores[0], scores[1] if with_entropy else None)


def target_logprobs(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities of some tokens of right-padded sequences: (B, T) fp32, 0 elsewhere.

    The head sees the states before these tokens alone, neither prompts nor padding.

    Args:
        model: a causal LM or an engine around one; called once, also without any target.
        targets: (B, T) bool, True where the token is to be predicted; a sequence's first token has
            nothing before it and never is.
    """
    wanted = targets[:, 1:]
    ids = input_ids[:, 1:][wanted]  # (N,)
    inputs = forward_inputs(model, input_ids, attention_mask)
    split = _split_of(model, input_ids)
    if split is None:
        logits = model(**inputs, use_cache=False).logits[:, :-1][wanted]
        (found,) = _in_blocks(lambda x: x, logits, ids, logits.shape[-1], 1.0, False)
    else:

        def score(head: Tensors, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return _in_blocks(head, states[:, :-1][wanted], ids, split.vocabulary, 1.0, False)

        (found,) = _pass_through(model, split, inputs, score)
    logprobs = found.new_zeros(input_ids.shape)
    logprobs[:, 1:][wanted] = found
    return logprobs


def _from_logits(
    model: nn.Module,
    sequences: torch.Tensor,
    attention_mask: torch.Tensor,
    answer_length: int,
    temperature: float,
    with_entropy: bool,
) -> list[torch.Tensor]:
    """Score by the model's own logits, unchanged: no copy, none in fp32."""
    inputs = forward_inputs(model, sequences, attention_mask)
    if takes_argument(model, "logits_to_keep"):
        inputs["logits_to_keep"] = answer_length + 1
    logits = model(**inputs, use_cache=False).logits[:, -answer_length - 1 :]
    # The last position predicts nothing; its target is ignored.
    targets = sequences[:, -answer_length - 1 :].roll(-1, dims=1)
    columns = _in_blocks(
        lambda x: x,
        logits.flatten(0, 1),
        targets.flatten(),
        logits.shape[-1],
        temperature,
        with_entropy,
    )
    return [column.view_as(targets)[:, :-1] for column in columns]


def _in_blocks(
    head: Tensors,
    states: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: int,
    temperature: float,
    with_entropy: bool,
) -> tuple[torch.Tensor, ...]:
    """(N, H) states and (N,) targets -> (N,) log-probabilities and, with_entropy, entropies."""
    rows = max(1, BLOCK_BYTES // (4 * vocabulary))
    parts = []
    for block, wanted in zip(states.split(rows), targets.split(rows), strict=True):
        arguments = head, block, wanted, temperature, with_entropy
        if torch.is_grad_enabled():
            # Nothing in a block is drawn at random: dropout is off.
            parts.append(
                checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            parts.append(_block(*arguments))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _block(
    head: Tensors,
    states: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    with_entropy: bool,
) -> tuple[torch.Tensor, ...]:
    logits = head(states).float()
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = token_logprobs(logits, targets)
    # The entropy comes last: the backward pass needs nothing of it and does not make it again.
    return (logprobs, token_entropy(logits.detach())) if with_entropy else (logprobs,)


@dataclass(frozen=True)
class _Split:
    """Causal LM as trunk and head: its logits are finish(head(trunk(inputs)))."""

    trunk: nn.Module
    head: nn.Module
    finish: Tensors
    vocabulary: int


def _pass_through(
    model: nn.Module,
    split: _Split,
    inputs: dict,
    score: Callable[[Tensors, torch.Tensor], tuple[torch.Tensor, ...]],
) -> tuple[torch.Tensor, ...]:
    """Call the model once, its head scoring in blocks instead of making all logits.

    Two `forward`s are replaced for this call: the model's by trunk, then head; the head's by
    `blocks`, which scores the trunk's states block by block. Calling trunk and head directly would
    be simpler, but DeepSpeed's ZeRO-3 gathers and releases weights in hooks around the calls of
    modules, and expects them once and in the usual order, forwards and backwards, on every rank.
    So the model and its head are called as modules, hooks included, and compute something else.
    """
    one_block = split.head.forward

    def blocks(states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return score(lambda x: split.finish(one_block(x)), states)

    def trunk_then_head(**inputs: Any) -> tuple[torch.Tensor, ...]:
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


_SPLITS: WeakKeyDictionary[nn.Module, _Split | None] = WeakKeyDictionary()


def _split_of(model: nn.Module, sequences: torch.Tensor) -> _Split | None:
    """Find the model's trunk and head, proven once; None where its logits are more than these."""
    module = unwrap(model)
    known = _SPLITS.get(module)
    if module in _SPLITS and (known is None or known.head is _parts(module)[1]):
        return known
    _SPLITS[module] = split = _proven_split(model, sequences)
    if split is None:
        print_rank_0(
            f"{type(module).__name__}: its logits are not those of an output head on a trunk; "
            "scoring keeps the logits of all answers of a batch"
        )
    return split


@torch.no_grad()
def _proven_split(model: nn.Module, sequences: torch.Tensor) -> _Split | None:
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
    return _Split(trunk, head, finish, actual.shape[-1])


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
