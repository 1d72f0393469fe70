"""Sampling by transformers' `generate`: prompts in, answers out, and the end of each answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from dschat.data.batches import PromptBatch
from dschat.functional.returns import answer_mask_from
from dschat.models.causal_lm import position_ids_from, takes_argument, unwrap
from dschat.rlhf.part_config import SamplingConfig
from dschat.text.encoding import decode
from dschat.utils.distributed import print_rank_0
from dschat.utils.module.model_source import resolve_model

SPARE_TOKENS = 8  # beyond a stop string's bytes: tokens without text, an incomplete first one


@dataclass(frozen=True)
class Sampled:
    """Prompts with the answers that were sampled for them."""

    sequences: torch.Tensor  # (B, P + A) ids: the prompts unchanged, then answers
    logprobs: torch.Tensor | None = None  # (B, A) fp32, by the sampler; None: it does not tell
    steps: int = 0  # decoding steps, in sequence; 0: one for each of the A tokens
    exact: bool = False  # `logprobs` are the policy's own but for rounding in fp32


def computes_exactly(dtype: torch.dtype) -> bool:
    """Tell whether models in this dtype compute the same in other shapes but for fp32 rounding."""
    return dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


class StopStrings(StoppingCriteria):
    """Texts that end an answer once it contains one; transformers calls it after each token."""

    def __init__(
        self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int = 0
    ):
        self.strings, self.tokenizer, self.prompt_length = strings, tokenizer, prompt_length
        # Tokens at an answer's end that can hold an entire stop string: one a byte, and some.
        self.reach = SPARE_TOKENS + max((len(text.encode()) for text in strings), default=0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """(B,) bool: rows whose answer is complete."""
        tails = input_ids[:, self.prompt_length :][:, -self.reach :]
        return torch.tensor(self.complete(tails.tolist()), device=input_ids.device)

    def end(self, answer: Sequence[int]) -> int | None:
        """Count tokens up to the one that completes the first stop string; None: none does."""
        ends = range(1, len(answer) + 1)
        tails = [list(answer[max(0, end - self.reach) : end]) for end in ends]
        return next((n for n, done in zip(ends, self.complete(tails), strict=True) if done), None)

    def complete(self, tails: list[list[int]]) -> list[bool]:
        """Return which of these ends of answers, of up to `reach` tokens, hold a stop string."""
        texts = [decode(self.tokenizer, tail) for tail in tails]
        return [any(stop in text for stop in self.strings) for text in texts]


def answer_ends(
    answers: torch.Tensor, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask the generated tokens that belong to the answers, and tell which answers have ended.

    An answer runs to its first end token, or to the token that completes a stop string, inclusive.
    Such a token counts entirely, also when its text goes on after the stop string.

    Returns:
        (B, A) bool mask, (B,) bool.
    """
    mask = answer_mask_from(answers, tokenizer.eos_token_id)
    ended = ((answers == tokenizer.eos_token_id) & mask).any(dim=-1)
    if stop_strings:
        stops = StopStrings(stop_strings, tokenizer)
        for row in range(len(answers)):
            end = stops.end(answers[row][mask[row]].tolist())
            if end is not None:
                mask[row, end:], ended[row] = False, True
    return mask, ended


class SamplerLogprobs(LogitsProcessor):
    """Notes the log-probability of each sampled token while the cache decodes it; changes nothing.

    transformers could return the scores of all steps; this keeps those of one step.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self._taken: list[torch.Tensor] = []  # (B,) each
        self._logprobs: torch.Tensor | None = None  # (B, V) of the token that comes next

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Record the token of the step before, and keep this step's distribution."""
        self._take(input_ids[:, -1])
        self._logprobs = (scores / self.temperature).log_softmax(dim=-1)
        return scores

    def _take(self, tokens: torch.Tensor) -> None:
        if self._logprobs is not None:
            self._taken.append(self._logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))

    def of(self, answers: torch.Tensor) -> torch.Tensor:
        """(B, A) ids as generated -> (B, A) fp32; anything after an answer's end."""
        self._take(answers[:, -1])
        return torch.stack(self._taken[: answers.shape[1]], dim=1)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    synced_gpus: bool = False,
) -> Sampled:
    """Sample one answer for every prompt.

    Args:
        model: a causal LM or an engine around one, in eval mode.
        synced_gpus: ranks go on together until all have ended (needed under ZeRO-3).

    Returns:
        A is the longest answer's length; rows that ended early are padded.
    """
    module: Any = unwrap(model)
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    config = GenerationConfig(
        max_new_tokens=sampling.max_answer_seq_len,
        min_new_tokens=sampling.min_answer_seq_len or None,
        do_sample=not sampling.greedy,
        **({} if sampling.greedy else drawn),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    inputs: dict[str, Any] = {
        "input_ids": prompts.input_ids,
        "attention_mask": prompts.attention_mask.long(),
    }
    if takes_argument(module, "position_ids"):
        inputs["position_ids"] = position_ids_from(prompts.attention_mask)
    if sampling.stop_strings:
        stops = StopStrings(sampling.stop_strings, tokenizer, prompts.input_ids.shape[1])
        inputs["stopping_criteria"] = StoppingCriteriaList([stops])
    noted = SamplerLogprobs(1.0 if sampling.greedy else sampling.temperature)
    inputs["logits_processor"] = LogitsProcessorList([noted])
    with own_generation_config(module, config):
        ids = module.generate(**inputs, generation_config=config, synced_gpus=synced_gpus)
    return Sampled(ids, noted.of(ids[:, prompts.input_ids.shape[1] :]))


def tell_unused_ends(model_name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the tokens that end a text by the model folder, but no answer here."""
    source = resolve_model(model_name_or_path)
    try:
        config = source.generation_config() or GenerationConfig.from_pretrained(source.base)
    except OSError:
        return  # a folder without one has no ends of its own
    ends = config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    others = [i for i in ends if i is not None and i != tokenizer.eos_token_id]
    for end in tokenizer.convert_ids_to_tokens(others):
        if end is not None:
            print_rank_0(
                f"{model_name_or_path}: {end} ends a text by its generation_config.json, but "
                f"answers end with {tokenizer.eos_token} alone; stop_strings '{end}' lets it end "
                "them as well"
            )


@contextlib.contextmanager
def own_generation_config(module: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Hide the folder's sampling settings, from which `generate` would fill ours up."""
    folders, module.generation_config = module.generation_config, config
    try:
        yield
    finally:
        module.generation_config = folders
