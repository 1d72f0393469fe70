"""Answers of candidates that are compared: sampled from a model, or read from a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dschat.data.collators import PromptCollator
from dschat.data.names import SUFFIXES
from dschat.data.sources import Finder, Rows
from dschat.data.store import read_examples
from dschat.data.tokenise import Converter
from dschat.data.user_reader import ReadOptions
from dschat.errors import UserError
from dschat.models.causal_lm import check_context, check_model_folder, create_hf_model
from dschat.models.config import check_kind
from dschat.models.padding_proof import prove_padding
from dschat.models.reward_head import check_language_model
from dschat.rlhf.generation import answer_ends, generate
from dschat.rlhf.part_config import SamplingConfig
from dschat.text.conversations import Example
from dschat.text.encoding import decode
from dschat.text.formats import CONFIG_KEY, PromptFormat, set_format
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.utils.distributed import set_random_seed
from dschat.utils.printable import printable


@dataclass(frozen=True)
class GivenAnswer:
    """Text of an answer; one that has not ended was cut by a length limit."""

    text: str
    ended: bool = True


@dataclass(frozen=True)
class AnsweringLimits:
    """What answers of a model are sampled under."""

    sampling: SamplingConfig
    prompt_format: str | None
    max_prompt_seq_len: int
    batch_size: int
    seed: int
    dtype: torch.dtype
    device: torch.device


def read_prompts(name: str, most: int | None, options: ReadOptions, setting: str) -> list[Example]:
    """Read the rows of a source, of its test part where it has one.

    Raises:
        UserError: nothing there, a malformed row, or no rows.
    """
    train, test = Finder(setting).find(name)
    return _examples(test or train, name, most, options, setting)


def _examples(
    rows: Rows, name: str, most: int | None, options: ReadOptions, setting: str
) -> list[Example]:
    skipped: Counter[str] = Counter()
    examples = list(islice(read_examples(rows, name, options, skipped), most))
    if not examples:
        raise UserError(f"{setting} {name}: holds no rows of use; give a file with at least one")
    return examples


def is_file_of_answers(name: str) -> bool:
    """Return whether a name is that of a file of answers, not of a model."""
    return Path(name).suffix in SUFFIXES


def read_answers(
    name: str, prompts: Sequence[Example], options: ReadOptions, setting: str = "candidates"
) -> list[GivenAnswer]:
    """Read answers from a file that has a row for each prompt, in their order.

    A row with `"ended": false` holds an answer that a limit cut.

    Raises:
        UserError: fewer rows, a row without an answer, or to another prompt.
    """
    source, _ = Finder(setting).find(name)
    cut: set[str] = set()

    def read() -> Iterator[tuple[str, Any]]:
        for place, row in source.read():
            if isinstance(row, Mapping) and row.get("ended") is False:
                cut.add(place)
            yield place, row

    rows = _examples(replace(source, read=read), name, len(prompts), options, setting)
    if len(rows) < len(prompts):
        raise UserError(
            f"{setting} {name}: has {len(rows)} rows for {len(prompts)} prompts; give a row for "
            "each, in the order of the prompts"
        )
    for row, asked in zip(rows, prompts, strict=True):
        if row.prompt != asked.prompt:
            raise UserError(f"{row.place}: its prompt is not that of {asked.place}; keep the order")
        if row.chosen is None:
            raise UserError(f"{row.place}: has no answer; add a column response")
    return [GivenAnswer(cast(str, row.chosen), row.place not in cut) for row in rows]


class Candidates:
    """Models and files whose answers are compared, checked before any model is loaded.

    Args:
        setting: that named them, for messages.

    Raises:
        UserError: see `read_answers` and `check_candidate`.
    """

    def __init__(
        self,
        names: Sequence[str],
        setting: str,
        prompts: Sequence[Example],
        limits: AnsweringLimits,
        options: ReadOptions,
    ):
        self.names, self.prompts, self.limits = names, prompts, limits
        self._given: dict[str, list[GivenAnswer]] = {}
        for name in names:
            if is_file_of_answers(name):
                self._given[name] = read_answers(name, prompts, options, setting)
            else:
                check_candidate(name, limits)

    def answers(self) -> list[list[GivenAnswer]]:
        """Collect each one's answers, one to each prompt; models answer in turn."""
        return [self._given.get(name) or self._sampled(name) for name in self.names]

    def _sampled(self, name: str) -> list[GivenAnswer]:
        print(printable(f"{name}: answers {len(self.prompts)} prompts"), flush=True)
        return sample_answers(name, self.prompts, self.limits)


def check_candidate(name: str, limits: AnsweringLimits) -> None:
    """Refuse a model that cannot answer, before any is loaded.

    Raises:
        UserError: no language model, or too few positions.
    """
    check_kind(name)
    tokenizer = load_hf_tokenizer(name)
    own_format(tokenizer, limits.prompt_format)
    check_model_folder(name, tokenizer)
    check_language_model(name)
    longest = limits.max_prompt_seq_len + limits.sampling.max_answer_seq_len
    check_context(name, longest, "max_prompt_seq_len and max_answer_seq_len")


def own_format(tokenizer: PreTrainedTokenizerBase, otherwise: str | None) -> PromptFormat:
    """Set the format that a model carries; `otherwise` is that of one that carries none."""
    stored = tokenizer.init_kwargs.get(CONFIG_KEY)
    return set_format(tokenizer, otherwise if stored is None else None)


@torch.no_grad()
def sample_answers(
    name: str, prompts: Sequence[Example], limits: AnsweringLimits
) -> list[GivenAnswer]:
    """Sample an answer to each prompt from a model, or an adapter on its base, in its own format.

    Prompts of like length are answered together; seed and batch size decide what is drawn.
    """
    tokenizer = load_hf_tokenizer(name)
    form = own_format(tokenizer, limits.prompt_format)
    convert = Converter(tokenizer, form, 3, limits.max_prompt_seq_len, None)
    columns = convert(list(prompts), Counter())
    rows = [{"prompt_ids": ids} for ids in columns["prompt_ids"]]
    sampling = limits.sampling
    if form.stop is not None:
        sampling = replace(sampling, stop_strings=(*sampling.stop_strings, form.stop))
    model: nn.Module = create_hf_model(name, tokenizer, limits.dtype)
    model.to(limits.device).eval()
    prove_padding(model, tokenizer, limits.device, name, left=True)
    set_random_seed(limits.seed)
    answers: list[GivenAnswer] = [GivenAnswer("")] * len(rows)
    order = np.argsort(columns["length"], kind="stable")
    collate = PromptCollator(tokenizer.pad_token_id)
    for start in range(0, len(rows), limits.batch_size):
        places = order[start : start + limits.batch_size].tolist()
        batch = collate([rows[place] for place in places]).to(limits.device)
        ids = generate(model, batch, sampling, tokenizer).sequences[:, batch.input_ids.shape[1] :]
        mask, ended = answer_ends(ids, tokenizer, sampling.stop_strings)
        for row, place in enumerate(places):
            text = decode(tokenizer, ids[row][mask[row]].tolist(), skip_special_tokens=True)
            answers[place] = GivenAnswer(_before(text, sampling.stop_strings), bool(ended[row]))
    return answers


def _before(text: str, stops: Sequence[str]) -> str:
    """Cut an answer where its first stop string begins."""
    starts: list[Any] = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(starts)] if starts else text
