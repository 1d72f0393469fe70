"""The proof that a rollout engine must pass."""

from dataclasses import dataclass

import pytest
import torch

from dschat.data.batches import PromptBatch
from dschat.errors import UserError
from dschat.rlhf.generation import Sampled
from dschat.rlhf.part_config import SamplingConfig
from dschat.rlhf.rollout_engine import TransformersRollout, check_parity
from tests.helpers import tiny
from tests.rlhf.tiny_roles import prompts


def plain(seed: int = 0) -> TransformersRollout:
    return TransformersRollout(tiny.tiny_llama(seed), tiny.byte_tokenizer())


@dataclass(frozen=True)
class Wrong:
    """Plain generation with one fault."""

    refills = False

    inner: TransformersRollout
    logit_error: float = 0.0
    wrong_token: bool = False
    short: bool = False

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig) -> Sampled:
        sequences = self.inner.generate(prompts, sampling).sequences
        if self.wrong_token:
            sequences[1, -2] += 1
        return Sampled(sequences[:, :-1] if self.short else sequences)

    def next_logits(self, prompts: PromptBatch) -> torch.Tensor:
        logits = self.inner.next_logits(prompts)
        logits[2, 7] += self.logit_error
        return logits

    def weights_changed(self) -> None:
        pass


def test_a_right_engine_passes():
    check_parity(plain(), plain(), prompts(), 6, "fast_engine")


@pytest.mark.parametrize(
    "fault, message",
    [
        ({"logit_error": 1e-3}, r"fast_engine: its logits after a prompt differ .* by 0.001, "),
        ({"logit_error": float("nan")}, "fast_engine: its logits after a prompt .* by nan"),
        ({"wrong_token": True}, r"fast_engine: token 5 of a greedy answer is \d+, plain"),
        ({"short": True}, r"fast_engine: it returns \(4, \d+\) ids for a prompt, plain"),
    ],
)
def test_a_wrong_engine_is_refused(fault, message):
    with pytest.raises(UserError, match=message):
        check_parity(Wrong(plain(), **fault), plain(), prompts(), 6, "fast_engine")


def test_an_engine_of_other_weights_is_refused():
    with pytest.raises(UserError, match="fast_engine: its logits"):
        check_parity(plain(seed=1), plain(), prompts(), 6, "fast_engine")
