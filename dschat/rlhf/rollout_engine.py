"""Rollout engines: what samples the answers of PPO, and the proof that a faster one must pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dschat.data.batches import PromptBatch
from dschat.errors import UserError
from dschat.models.causal_lm import forward_inputs, unwrap
from dschat.rlhf.generation import Sampled, generate
from dschat.rlhf.part_config import SamplingConfig
from dschat.utils.module.lora import fused_adapters

ROUNDINGS = 8  # of the largest logit, by which two ways of adding the same may differ


class RolloutEngine(Protocol):
    """Sampler of answers; a faster one than `TransformersRollout` may take its place.

    Attributes:
        refills: it takes any number of prompts, and decides by itself how many answers grow at a
            time; False: it gets chunks of prompts of like length.
    """

    @property
    def refills(self) -> bool:
        """See the class."""

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig) -> Sampled:
        """Sample one answer for every prompt, by the policy's present weights.

        Every rank calls it equally often. `answer_ends` says what counts of an answer. The answers
        come with their log-probabilities at the sampling temperature, over the entire vocabulary:
        their gap to the policy's is logged, and `rollout_importance_cap` corrects it.
        """

    def next_logits(self, prompts: PromptBatch) -> torch.Tensor | None:
        """(B, V) logits of each answer's first token, before temperature and truncation.

        None where the engine tells log-probabilities of sampled tokens alone.
        """

    def weights_changed(self) -> None:
        """Drop what was made of the policy's weights: they are others now.

        Called after each update, after a checkpoint was loaded, and by whoever switches adapters.
        """


@runtime_checkable
class RunsApart(Protocol):
    """A rollout engine that samples while the trainer does something else."""

    def start(self, prompts: PromptBatch, sampling: SamplingConfig) -> Callable[[], Sampled]:
        """Begin to sample by the present weights; the call that is returned waits for the answers.

        Later changes of the weights do not matter. Every rank calls it equally often; what it
        returns may be called again, and waits for no other rank.
        """


@dataclass(frozen=True)
class TransformersRollout:
    """Samples by transformers' own `generate`, on the training engine's weights."""

    refills: ClassVar[bool] = False

    model: nn.Module  # a causal LM or an engine around one, in eval mode when it generates
    tokenizer: PreTrainedTokenizerBase
    synced_gpus: bool = False  # ranks go on together until all have ended (needed under ZeRO-3)
    fuse_adapters: bool = False  # add adapters to the weights for the time being

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig) -> Sampled:
        """See `RolloutEngine`; rows that end early are padded, the longest ends the batch."""
        with self._weights():
            return generate(
                self.model, prompts, sampling, self.tokenizer, synced_gpus=self.synced_gpus
            )

    @torch.no_grad()
    def next_logits(self, prompts: PromptBatch) -> torch.Tensor:
        """See `RolloutEngine`."""
        inputs = forward_inputs(self.model, prompts.input_ids, prompts.attention_mask)
        with self._weights():
            return unwrap(self.model)(**inputs, use_cache=False).logits[:, -1]

    def weights_changed(self) -> None:
        """See `RolloutEngine`; nothing is kept between calls."""

    def _weights(self) -> contextlib.AbstractContextManager[None]:
        fuse = self.fuse_adapters
        return fused_adapters(unwrap(self.model)) if fuse else contextlib.nullcontext()


def check_parity(
    candidate: RolloutEngine, plain: RolloutEngine, prompts: PromptBatch, tokens: int, flag: str
) -> None:
    """Check that an engine's logits, if it tells them, and greedy answers are plain generation's.

    Args:
        tokens: generated for each prompt; ends of answers do not stop them.
        flag: the setting that chose the candidate, for messages.

    Raises:
        UserError: with the largest difference of logits, or the first token that differs.
    """
    _check_logits(plain.next_logits(prompts), candidate.next_logits(prompts), flag)
    sampling = SamplingConfig(tokens, min_answer_seq_len=tokens, greedy=True)
    expected, actual = (e.generate(prompts, sampling).sequences for e in (plain, candidate))
    if torch.equal(actual, expected):
        return
    if actual.shape != expected.shape:
        raise UserError(
            f"{flag}: it returns {tuple(actual.shape)} ids for a prompt, plain generation "
            f"{tuple(expected.shape)}; drop the flag"
        )
    row, column = (actual != expected).nonzero()[0].tolist()
    place = column - prompts.input_ids.shape[1] + 1
    raise UserError(
        f"{flag}: token {place} of a greedy answer is {actual[row, column].item()}, plain "
        f"generation has {expected[row, column].item()}; drop the flag"
    )


def _check_logits(expected: torch.Tensor | None, actual: torch.Tensor | None, flag: str) -> None:
    if expected is None or actual is None:
        return
    allowed = ROUNDINGS * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    gap = (actual.float() - expected.float()).abs().max().item()
    if not gap <= allowed:  # a NaN is no agreement
        raise UserError(
            f"{flag}: its logits after a prompt differ from plain generation's by {gap:.2g}, "
            f"rounding allows {allowed:.2g}; drop the flag"
        )
