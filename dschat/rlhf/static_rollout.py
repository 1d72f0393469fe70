"""A rollout engine on a static cache: rows that have ended make room for the prompts that wait."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from dschat.data.batches import PromptBatch
from dschat.functional.returns import answer_mask_from
from dschat.models.causal_lm import forward_inputs
from dschat.rlhf.drawing import Drawing
from dschat.rlhf.generation import Sampled, SamplingConfig, StopStrings, computes_exactly
from dschat.rlhf.static_model import StaticModel
from dschat.utils.module.lora import fused_adapters

FREE = 8  # an eighth of the rows is free before prompts are put there: one pass for several
LATE = 8  # tokens after which a device is asked which answers have ended; a CPU, after each one


@dataclass(frozen=True)
class StaticRollout:
    """Samples by one static cache for all prompts; copies of one prompt are computed once.

    Attributes:
        rows: answers that grow at a time.
        fuse_adapters: add adapters to the weights for the time being.
    """

    refills: ClassVar[bool] = True

    static: StaticModel  # in eval mode when it generates
    tokenizer: PreTrainedTokenizerBase
    rows: int
    fuse_adapters: bool = False

    @torch.no_grad()
    def generate(self, prompts: PromptBatch, sampling: SamplingConfig) -> Sampled:
        """See `RolloutEngine`; takes any number of prompts."""
        with self._weights():
            self.static.refresh()
            return _Decoding(self, prompts, sampling).run()

    @torch.no_grad()
    def next_logits(self, prompts: PromptBatch) -> torch.Tensor:
        """See `RolloutEngine`."""
        model = self.static.model
        inputs = forward_inputs(model, prompts.input_ids, prompts.attention_mask)
        with self._weights():
            return model(**inputs, use_cache=False).logits[:, -1]

    def weights_changed(self) -> None:
        """See `RolloutEngine`; weights are read again for each set of prompts."""

    def _weights(self) -> contextlib.AbstractContextManager[None]:
        fuse = self.fuse_adapters
        return fused_adapters(self.static.model) if fuse else contextlib.nullcontext()


def _asks_at_once(device: torch.device) -> bool:
    """Return whether a device answers without being waited for."""
    return device.type == "cpu"


class _Decoding:
    """Decodes one set of prompts; a slot is a row of the cache.

    Attributes:
        waiting: rows of the prompts, the next one last; copies of one prompt stand together.
        row: of each slot's answer; None: the slot is free.
        column, first, length: (N,) by slot: where its next token goes, where its text begins,
            tokens of its answer. alive, ended: (N,) its answer goes on; has its end token.
        target: (N,) row of the answer, of free slots one that nobody reads.
    """

    def __init__(self, engine: StaticRollout, prompts: PromptBatch, sampling: SamplingConfig):
        tokenizer, texts, device = engine.tokenizer, sampling.stop_strings, prompts.real.device
        self.static, self.prompts, self.sampling = engine.static, prompts, sampling
        self.pad, self.end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.draw = Drawing(sampling, self.end)
        self.stops = StopStrings(texts, tokenizer) if texts else None
        # An answer that has ended goes on until its device is asked, but never beyond the longest.
        self.every = 1 if texts or _asks_at_once(device) else LATE
        room = sampling.max_answer_seq_len + 1  # one that free slots write to
        lengths = prompts.attention_mask.sum(-1)
        count, slots = len(lengths), min(engine.rows, len(lengths))
        # Long prompts come first, so that the cache has its width at once.
        self.waiting = lengths.argsort(stable=True).tolist()
        self.widths: list[int] = lengths.tolist()
        self.limit = max(self.widths) + room
        self.cache = self.static.cache(slots)
        self.row: list[int | None] = [None] * slots
        self.reached = [0] * slots  # each slot's column, known without the device
        self.left = [0] * slots  # tokens that its answer may still have
        self.answers = torch.full((count + 1, room), self.pad, device=device)
        self.logprobs = torch.zeros(count + 1, room, device=device)
        self.written = torch.zeros(count, dtype=torch.long, device=device)
        self.column, self.first, self.length = torch.zeros(3, slots, dtype=torch.long).to(device)
        self.alive, self.ended = torch.zeros(2, slots, dtype=torch.bool).to(device)
        self.target = torch.full((slots,), count, device=device)
        self.tokens = torch.full((slots,), self.pad, device=device)
        self.steps = 0

    def run(self) -> Sampled:
        """Decode until no prompt waits and no answer goes on."""
        self.fill()
        while (free := self.row.count(None)) < len(self.row):
            if not self.waiting and 2 * free >= len(self.row):
                self.compact()
            left = min(n for n, row in zip(self.left, self.row, strict=True) if row is not None)
            for _ in range(min(self.every, left)):
                self.advance()
            self.release()
            if self.waiting and FREE * self.row.count(None) >= len(self.row):
                self.fill()
        return self.result()

    def fill(self) -> None:
        """Put prompts that wait into the free slots, and draw the first tokens of answers."""
        while self.waiting and None in self.row:
            free = [slot for slot, row in enumerate(self.row) if row is None]
            taken = [self.waiting.pop() for _ in range(min(len(free), len(self.waiting)))]
            self._prefill(free[: len(taken)], taken)
            self.release()

    def _prefill(self, slots: list[int], rows: list[int]) -> None:
        width = max(self.widths[row] for row in rows)
        into, of = torch.tensor([slots, rows], device=self.tokens.device)
        ids, mask = (x[of, -width:] for x in (self.prompts.input_ids, self.prompts.attention_mask))
        # Copies of a prompt are computed once.
        once, source = torch.stack([ids, mask.long()]).unique(dim=1, return_inverse=True)
        logits = self.static.prefill(self.cache, once[0], once[1].bool(), into, source)
        self.column[into], self.first[into] = width, width - mask.sum(-1)
        self.length[into], self.target[into] = 0, of
        self.alive[into], self.ended[into] = True, False
        for slot, row in zip(slots, rows, strict=True):
            self.row[slot], self.reached[slot] = row, width
            self.left[slot] = self.sampling.max_answer_seq_len - 1
        tokens, logprobs = self.draw(logits, self.length[into])
        self.answers[of, 0], self.logprobs[of, 0] = tokens, logprobs
        self.tokens[into], self.length[into] = tokens, 1
        self.ended[into] = tokens == self.end
        self.steps += 1

    def advance(self) -> None:
        """Decode one token of every answer; free slots compute what nobody reads."""
        width = 1 + max(self.reached[s] for s, row in enumerate(self.row) if row is not None)
        self.cache.reserve(width, self.limit)
        logits = self.static.step(self.cache, self.tokens, self.column, self.first, width)
        self.tokens, logprobs = self.draw(logits, self.length)
        place = self.target, self.length
        self.answers[place], self.logprobs[place] = self.tokens, logprobs
        self.column += self.alive
        self.length += self.alive
        self.ended |= self.tokens == self.end
        self.reached = [column + 1 for column in self.reached]
        self.left = [tokens - 1 for tokens in self.left]
        self.steps += 1

    def release(self) -> None:
        """Free the slots whose answers have ended; here the device is waited for."""
        ended = (self.ended | (self.length >= self.sampling.max_answer_seq_len)).tolist()
        live = [slot for slot, row in enumerate(self.row) if row is not None]
        if self.stops is not None:
            for slot, has_stop in zip(live, self._stopped(self.stops, live), strict=True):
                ended[slot] = ended[slot] or has_stop
        slots = [slot for slot in live if ended[slot]]
        if not slots:
            return
        index = torch.tensor(slots, device=self.tokens.device)
        self.written[self.target[index]] = self.length[index]
        self.alive[index], self.target[index] = False, len(self.written)
        self.column[index] = self.first[index] = 0  # inside the cache, however it has grown
        for slot in slots:
            self.row[slot] = None

    def _stopped(self, stops: StopStrings, slots: list[int]) -> list[bool]:
        ends = self.length.tolist()
        tails = [
            self.answers[self.row[s], max(0, ends[s] - stops.reach) : ends[s]].tolist()
            for s in slots
        ]
        return stops.complete(tails)

    def compact(self) -> None:
        """Leave the free slots out of the cache: no prompt waits for them."""
        kept = [slot for slot, row in enumerate(self.row) if row is not None]
        index = torch.tensor(kept, device=self.tokens.device)
        self.cache.keep(index)
        self.row = [self.row[slot] for slot in kept]
        self.reached = [self.reached[slot] for slot in kept]
        self.left = [self.left[slot] for slot in kept]
        for name in ("column", "first", "length", "alive", "ended", "target", "tokens"):
            setattr(self, name, getattr(self, name)[index])

    def result(self) -> Sampled:
        """Put the answers after their prompts, padded after their ends."""
        answers = self.answers[:-1, : self.sampling.max_answer_seq_len]
        columns = torch.arange(answers.shape[1], device=answers.device)
        mask = answer_mask_from(answers, self.end) & (columns < self.written.unsqueeze(-1))
        longest = int(mask.sum(-1).max())
        answers = answers.masked_fill(~mask, self.pad)[:, :longest]
        sequences = torch.cat([self.prompts.input_ids, answers], dim=1)
        exact = computes_exactly(self.static.dtype)
        return Sampled(sequences, self.logprobs[:-1, :longest], self.steps, exact)
