"""Experience: one rollout as a typed record with shapes; split into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from dschat.data.columns import OwnColumns, picked
from dschat.lazy import torch
from dschat.rlhf.kept_pass import KeptPass
from dschat.rlhf.micro_batches import MicroBatch, RowLengths, dealt, in_turn


@dataclass(frozen=True)
class Experience:
    """B prompts padded on the left to P tokens, and answers of up to A tokens sampled for them."""

    sequences: torch.Tensor  # (B, P + A) int64
    attention_mask: torch.Tensor  # (B, P + A) bool: prompt without padding, answer with its end
    answer_mask: torch.Tensor  # (B, A) bool
    ended: torch.Tensor  # (B,) bool: the answer has its end token, or a stop string
    real: torch.Tensor  # (B,) bool: False for rows that only fill the batch
    logprobs: torch.Tensor  # (B, A) fp32, the sampling policy's; 0 after an answer's end
    ref_logprobs: torch.Tensor  # (B, A) fp32, likewise
    values: torch.Tensor | None  # (B, A) fp32, of the state before each token; None: no critic
    model_scores: torch.Tensor | None  # (B,) fp32, the reward model's; None: there is none
    group: torch.Tensor  # (B,) int64: answers to one prompt share a number, on this rank alone
    sampler_logprobs: torch.Tensor | None = None  # (B, A) fp32, of the engine that drew the answers
    rewards: torch.Tensor | None = None  # (B,) fp32, the weighted sum of the scores (rewards.py)
    scored: torch.Tensor | None = None  # (B,) bool: has a reward; the others teach nothing
    function_scores: torch.Tensor | None = None  # (B, F) fp32, of each reward function
    function_scored: torch.Tensor | None = None  # (B, F) bool: False where the score is None
    advantages: torch.Tensor | None = None  # (B, A)
    returns: torch.Tensor | None = None  # (B, A)
    trained: torch.Tensor | None = None  # (B, A) bool: tokens of the losses; None: all of answers
    # Of a complete iteration's generation: its first experience alone holds them.
    generation_seconds: float = 0.0
    generation_steps: int = 0  # decoding steps, in sequence
    staleness: int = 0  # updates of the policy since its answers were started
    from_sampler: bool = False  # `logprobs` are the sampler's; the policy made no pass
    micro_batches: list[MicroBatch] | None = None  # that scoring was over, and epoch one is
    kept: KeptPass | None = None  # the critic's pass, where its only step can do with that one
    columns: OwnColumns | None = None  # (B,) the rows' own, by name; None: none are kept

    def __len__(self) -> int:
        return len(self.real)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the critic's pass, and the plan of the update, out of files and copies."""
        return {**vars(self), "kept": None, "micro_batches": None}

    @property
    def prompt_length(self) -> int:
        """P, padding included."""
        return self.sequences.shape[1] - self.answer_mask.shape[1]

    @property
    def counted(self) -> torch.Tensor:
        """(B,) bool: real rows that have a reward, in all statistics of rewards and in the loss."""
        return self.real if self.scored is None else self.real & self.scored

    @property
    def loss_mask(self) -> torch.Tensor:
        """(B, A) bool: the tokens that losses, and means over their steps, are over."""
        return self.answer_mask if self.trained is None else self.trained

    @property
    def answers(self) -> torch.Tensor:
        """(B, A) ids of the answers."""
        return self.sequences[:, self.prompt_length :]

    def with_returns(
        self, advantages: torch.Tensor, returns: torch.Tensor | None = None
    ) -> Experience:
        """Add what the update learns from."""
        return replace(self, advantages=advantages, returns=returns)

    def rows(self, index: torch.Tensor) -> Experience:
        """Pick the rows of `index`, in its order."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {
            n: c[index] for n, c in own.items() if isinstance(c, torch.Tensor)
        }
        kept = None if self.kept is None else self.kept.rows(index)
        columns = picked(self.columns, index)
        return replace(self, **tensors, kept=kept, micro_batches=None, columns=columns)

    def micro_batch(self, chosen: MicroBatch) -> Experience:
        """Pick the rows of a micro-batch, no wider than they need."""
        rows = self.rows(chosen.index.to(self.real.device))
        if (chosen.prompt, chosen.answer) == (self.prompt_length, self.answer_mask.shape[1]):
            return rows  # with the pass that was kept for it
        return rows.narrowed(chosen.prompt, chosen.answer)

    def widened(self, prompt: int, answer: int, pad_token_id: int) -> Experience:
        """Pad prompts on the left to `prompt` tokens, and answers on the right to `answer`."""
        length, tokens = self.prompt_length, self.answer_mask.shape[1]
        sides = (prompt - length, answer - tokens)
        columns: dict[str, Any] = {
            name: _padded(column, (0, sides[1]), 0)
            for name in OF_ANSWERS
            if (column := getattr(self, name)) is not None
        }
        columns["sequences"] = _padded(self.sequences, sides, pad_token_id)
        columns["attention_mask"] = _padded(self.attention_mask, sides, 0)
        return replace(self, **columns, kept=None, micro_batches=None)

    def narrowed(self, prompt: int, answer: int) -> Experience:
        """Leave out padding before prompts and after answers of that many tokens at most."""
        length = self.prompt_length
        columns: dict[str, Any] = {
            name: column[:, :answer]
            for name in OF_ANSWERS
            if (column := getattr(self, name)) is not None
        }
        inside = slice(length - prompt, length + answer)
        columns["sequences"] = self.sequences[:, inside]
        columns["attention_mask"] = self.attention_mask[:, inside]
        return replace(self, **columns, kept=None, micro_batches=None)


OF_ANSWERS = {
    *("answer_mask", "logprobs", "ref_logprobs", "values", "sampler_logprobs"),
    *("advantages", "returns", "trained"),
}  # (B, A)


def _padded(column: torch.Tensor, sides: tuple[int, int], value: int) -> torch.Tensor:
    return torch.nn.functional.pad(column, sides, value=value)


def stacked(experiences: list[Experience], pad_token_id: int) -> Experience:
    """Put rollouts of several widths into one, rows in their order, as wide as the widest.

    They must have the same columns; what its first experience holds of a generation is dropped.
    """
    prompt = max(e.prompt_length for e in experiences)
    answer = max(e.answer_mask.shape[1] for e in experiences)
    wide = [e.widened(prompt, answer, pad_token_id) for e in experiences]
    nothing: dict[str, Any] = {}  # of a batch of filler in a stream
    own = [e.columns or (nothing,) * len(e) for e in wide]
    tensors: dict[str, Any] = {
        f.name: torch.cat([getattr(e, f.name) for e in wide])
        for f in fields(Experience)
        if isinstance(getattr(wide[0], f.name), torch.Tensor)
    }
    kept = any(e.columns is not None for e in wide)
    columns = tuple(row for rows in own for row in rows) if kept else None
    return replace(wide[0], **tensors, columns=columns, generation_seconds=0.0, generation_steps=0)


def filled(column: torch.Tensor | None) -> torch.Tensor:
    """Narrow the type of a column that an earlier stage has filled.

    Raises:
        ValueError: it has not.
    """
    if column is None:
        raise ValueError("a column of the experience is empty: an earlier stage fills it")
    return column


def in_micro_batches(
    experiences: list[Experience],
    size: int,
    accumulated: int,
    generator: torch.Generator,
    *,
    is_first: bool = False,
) -> Iterator[Experience]:
    """Yield every row once, in micro-batches as `dealt`, each as narrow as its rows allow.

    Args:
        size: rows. accumulated: micro-batches of an optimizer step.
        is_first: an epoch over answers that were just scored has the micro-batches of scoring.
    """
    lengths = [RowLengths.of(e.attention_mask, e.prompt_length, e.real) for e in experiences]
    planned = [e.micro_batches for e in experiences]
    if not is_first or any(plan is None for plan in planned):
        planned = [*dealt(lengths, size, accumulated, generator)]
    for number in in_turn(lengths):
        for micro_batch in planned[number] or ():
            yield experiences[number].micro_batch(micro_batch)
