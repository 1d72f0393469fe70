"""Answers that are sampled one update ahead of their training, kept over a stop of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dschat.data.batches import PromptBatch
from dschat.rlhf.answering import Generated, PendingAnswers
from dschat.utils.distributed import Distributed, all_reduce_max, print_rank_0


class RolloutsAhead:
    """The answers that are under way while the policy trains on those before them.

    A checkpoint waits for them and holds them: they are of a policy that is no more.
    """

    per_rank = True

    def __init__(self, process: Distributed):
        self.process = process
        self._pending: PendingAnswers | None = None
        self._saved: dict[str, Any] = {}

    def put(self, pending: PendingAnswers) -> None:
        """Keep answers that are being sampled."""
        self._pending = pending

    def take(self, prepared: Callable[[], list[PromptBatch]]) -> PendingAnswers | None:
        """Return the pending answers to the next prompts, if there are any.

        Args:
            prepared: makes these prompts ready, for answers that a checkpoint held.
        """
        pending, self._pending = self._pending, None
        if pending is None and self._saved:
            saved, self._saved, batches = self._saved, {}, prepared()
            device, logprobs = batches[0].real.device, saved["logprobs"]
            logprobs = None if logprobs is None else logprobs.to(device)
            held = Generated(saved["answers"].to(device), logprobs, saved["steps"])
            pending = PendingAnswers(batches, lambda: held, saved["updates"])
        return pending

    def state_dict(self) -> dict[str, Any]:
        """Answers, as ids, and what is known of them; empty where none are under way."""
        if self._pending is None:
            return self._saved
        made = self._pending.wait()
        logprobs = None if made.logprobs is None else made.logprobs.cpu()
        place = {"rank": self.process.rank, "ranks": self.process.world_size}
        made = replace(made, answers=made.answers.cpu(), logprobs=logprobs)
        return {**vars(made), **place, "updates": self._pending.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with these answers; with another number of ranks, with none."""
        here = {"rank": self.process.rank, "ranks": self.process.world_size}
        (others,) = all_reduce_max([float(bool(state) and not here.items() <= state.items())])
        self._pending, self._saved = None, {} if others else state
        if others:
            print_rank_0("resume: answers of other ranks were under way; they are sampled again")
