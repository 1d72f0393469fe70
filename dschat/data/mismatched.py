"""Prompts with answers to other prompts, from which KTO estimates a distance."""

from __future__ import annotations

from dataclasses import dataclass

import datasets

from dschat.data.batches import Row
from dschat.text.encoding import truncate


@dataclass(frozen=True)
class Mismatched:
    """Makes of a phase-2 row a phase-1 row: its prompt with the answer of the row after it.

    That row is the next of the set, after the last one the first; its chosen answer where its
    number is even, the rejected one where it is odd. So which answer meets which prompt depends
    neither on the epoch nor on the batch.
    """

    rows: datasets.Dataset
    max_seq_len: int
    bos_id: int | None

    def __call__(self, row: Row) -> Row:
        """Join and truncate as a pair is; `real` stays."""
        number = (row["number"] + 1) % len(self.rows)
        other = self.rows[number]
        answer = other["rejected_ids" if number % 2 else "chosen_ids"][other["prompt_len"] :]
        prompt = row["chosen_ids"][: row["prompt_len"]]
        short = truncate(prompt, [answer], self.max_seq_len, self.bos_id)
        start, ids = len(short.prompt), short.prompt + short.answers[0]
        return {
            "input_ids": ids,
            "trained": [start, len(ids)],
            "length": len(ids),
            "real": row["real"],
        }
