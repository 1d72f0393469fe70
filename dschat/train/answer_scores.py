"""Scores of single answers by a reward model: of tokenised rows, and of lines of text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from dschat.data.answers import answer_rows
from dschat.data.collators import SFTCollator
from dschat.data.store import choose_reader
from dschat.data.tokenise import Converter
from dschat.data.user_reader import ReadOptions
from dschat.errors import UserError, parse_json
from dschat.models.causal_lm import eval_mode
from dschat.models.reward_model import scores_at_end
from dschat.models.right_padding import needed_mask
from dschat.text.conversations import Example, Skip, kind_of
from dschat.text.formats import RawFormat


@torch.no_grad()
def score_answers(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    device: torch.device,
    batch_size: int,
) -> torch.Tensor:
    """Score the rows of `answer_rows`, those of like length together: (N,) float64.

    Raises:
        UserError: a score is not finite.
    """
    scores = torch.zeros(len(rows), dtype=torch.float64)
    order = np.argsort([row["length"] for row in rows], kind="stable")
    collate = SFTCollator(pad_token_id)
    with eval_mode(model):
        for start in range(0, len(rows), batch_size):
            places = order[start : start + batch_size].tolist()
            batch = collate([dict(rows[place]) for place in places]).to(device)
            mask = needed_mask(model, batch.input_ids, batch.attention_mask)
            values = model(batch.input_ids, mask)
            scores[places] = scores_at_end(values, batch.attention_mask).double().cpu()
    if broken := int((~torch.isfinite(scores)).sum()):
        raise UserError(
            f"reward model: {broken} of {len(scores)} answers have scores that are not finite; "
            "look at its weights, or give dtype fp32"
        )
    return scores


@dataclass(frozen=True)
class LineScorer:
    """Scores lines: an object is a row as in a data file, anything else a text as it stands.

    Attributes:
        convert: of the model's own prompt format.
    """

    model: nn.Module
    convert: Converter
    device: torch.device
    options: ReadOptions

    def __call__(self, lines: Iterable[str]) -> Iterator[str]:
        """Score each line as it comes, as JSON with score and tokens; blank ones are passed over.

        `cut` stands with what was longer than the limit.

        Raises:
            UserError: a line that is no row with an answer, by its number.
        """
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield self._scored(line.rstrip("\r\n"))
                except UserError as error:
                    raise UserError(f"line {number}: {error}") from error

    def _scored(self, line: str) -> str:
        example, convert = self._read(line)
        cut: Counter[str] = Counter()
        rows, tokenizer = answer_rows(convert, [example], counts=cut), convert.tokenizer
        (score,) = score_answers(self.model, rows, tokenizer.pad_token_id, self.device, 1).tolist()
        scored = {"score": score, "tokens": rows[0]["length"]}
        return json.dumps(scored | ({"cut": True} if cut.total() else {}))

    def _read(self, line: str) -> tuple[Example, Converter]:
        value: Any = line
        if line.lstrip()[0] in '{"':
            try:
                value = parse_json(line)
            except ValueError as error:
                raise UserError(f"begins like JSON and is none ({error})") from error
        if isinstance(value, str):
            return Example("", value), replace(self.convert, form=RawFormat())
        try:
            example = choose_reader(self.options, "standard input", value)(value)
        except Skip as reason:
            raise UserError(f"holds no answer ({reason})") from reason
        for column, text in (("prompt", example.prompt), ("response", example.chosen)):
            if not isinstance(text, str | tuple):
                raise UserError(f"column {column!r} is {kind_of(text)}, needs text")
        return example, self.convert
