"""DeepSpeed's hybrid engine as a rollout engine, and the proof that any engine must pass.

The hybrid engine puts inference kernels of its own under the layers while it generates. They cover
few architectures; what they compute is therefore compared with plain generation before a run
relies on it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dschat.data.collators import PromptBatch
from dschat.errors import UserError, brief
from dschat.models.causal_lm import unwrap
from dschat.rlhf.generation import RolloutEngine, SamplingConfig, TransformersRollout

FLAG = "enable_hybrid_engine"
ROUNDINGS = 8  # of the largest logit, by which two ways of adding the same may differ


def check_hybrid_available() -> None:
    """Stop before models are loaded where DeepSpeed's inference kernels cannot run.

    Raises:
        UserError: naming the device, or the operator that is missing.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cuda":
        raise UserError(
            f"{FLAG}: DeepSpeed's inference kernels need a CUDA GPU, and this run is on "
            f"{accelerator.device_name()}; drop the flag"
        )
    builder = accelerator.create_op_builder("InferenceBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        raise UserError(
            f"{FLAG}: DeepSpeed cannot build its inference kernels here (operator "
            "transformer_inference; see ds_report); drop the flag"
        )


@dataclass(frozen=True)
class HybridRollout:
    """Answers by the kernels of a DeepSpeedHybridEngine, which are in place only meanwhile."""

    plain: TransformersRollout

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig) -> torch.Tensor:
        """As `RolloutEngine` says."""
        with _kernels(self.plain.model):
            return self.plain.generate(prompts, sampling)

    def next_logits(self, prompts: PromptBatch) -> torch.Tensor:
        """As `RolloutEngine` says."""
        with _kernels(self.plain.model):
            return self.plain.next_logits(prompts)


@contextlib.contextmanager
def _kernels(engine: nn.Module) -> Iterator[None]:
    """DeepSpeed switches to its kernels in `eval()`, and back in `train()`.

    Outside, the layers' own forward passes are in place, in eval mode, so that scoring and training
    compute the same function.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints latencies at every switch
        engine.eval()
    try:
        yield
    finally:
        engine.train()
        engine.module.eval()


@dataclass(frozen=True)
class _WithoutKernels:
    """Plain generation from the same engine, whose module's `generate` DeepSpeed has replaced."""

    plain: TransformersRollout

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig) -> torch.Tensor:
        engine = self.plain.model
        engine.train()
        engine.module.eval()
        replaced, engine.module.generate = engine.module.generate, engine._generate
        try:
            return self.plain.generate(prompts, sampling)
        finally:
            engine.module.generate = replaced

    def next_logits(self, prompts: PromptBatch) -> torch.Tensor:
        self.plain.model.train()
        self.plain.model.module.eval()
        return self.plain.next_logits(prompts)


def rollout_engine(
    roles, fuse_adapters: bool, proof: PromptBatch | None, tokens: int
) -> RolloutEngine:
    """What samples the actor's answers.

    Args:
        roles: a `DeepSpeedRLHFEngine`.
        proof: prompts on which the hybrid engine has to prove itself; None: plain generation.
        tokens: that the proof generates.
    """
    plain = TransformersRollout(
        roles.actor, roles.tokenizer, roles.generates_in_step, fuse_adapters
    )
    return plain if proof is None else proven_hybrid(plain, proof.to(roles.device), tokens)


def proven_hybrid(plain: TransformersRollout, prompts: PromptBatch, tokens: int) -> HybridRollout:
    """The hybrid engine as a rollout engine, after its proof on these prompts.

    Args:
        plain: around a DeepSpeedHybridEngine. tokens: that the proof generates.

    Raises:
        UserError: there are no kernels for this model, they fail, or they differ.
    """
    name = type(unwrap(plain.model)).__name__
    if not getattr(plain.model, "_inference_containers", None):
        raise UserError(f"{FLAG}: DeepSpeed has no inference kernels for {name}; drop the flag")
    hybrid = HybridRollout(plain)
    try:
        check_parity(hybrid, _WithoutKernels(plain), prompts, tokens, FLAG)
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{FLAG}: DeepSpeed's kernels fail on {name} ({brief(error)}); drop the flag"
        ) from error
    return hybrid


def check_parity(
    candidate: RolloutEngine, plain: RolloutEngine, prompts: PromptBatch, tokens: int, flag: str
) -> None:
    """Stop unless an engine's logits and greedy answers are those of plain generation.

    Args:
        tokens: generated for each prompt; ends of answers do not stop them.
        flag: what asks for the candidate, for messages.

    Raises:
        UserError: with the largest difference of logits, or the first token that differs.
    """
    expected, actual = plain.next_logits(prompts), candidate.next_logits(prompts)
    allowed = ROUNDINGS * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    gap = (actual.float() - expected.float()).abs().max().item()
    if not gap <= allowed:  # a NaN is no agreement
        raise UserError(
            f"{flag}: its logits behind a prompt differ from plain generation's by {gap:.2g}, "
            f"rounding allows {allowed:.2g}; drop the flag"
        )
    sampling = SamplingConfig(tokens, min_new_tokens=tokens, greedy=True)
    expected, actual = (e.generate(prompts, sampling) for e in (plain, candidate))
    if torch.equal(actual, expected):
        return
    if actual.shape != expected.shape:
        raise UserError(
            f"{flag}: it returns {tuple(actual.shape)} ids for a prompt, plain generation "
            f"{tuple(expected.shape)}; drop the flag"
        )
    row, column = (actual != expected).nonzero()[0].tolist()
    at = column - prompts.input_ids.shape[1] + 1
    raise UserError(
        f"{flag}: token {at} of a greedy answer is {actual[row, column].item()}, plain generation "
        f"has {expected[row, column].item()}; drop the flag"
    )
