"""Text rows to token rows: encode, cut to length with the end token kept, drop and count."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.utils.model.tokenizer import encode, encode_answers

_IDS, _COUNT = datasets.List(datasets.Value("int32")), datasets.Value("int32")
# `length` is that of the longest sequence of a row: loaders group by it without reading tokens.
FEATURES = {
    1: datasets.Features({"input_ids": _IDS, "prompt_len": _COUNT, "length": _COUNT}),
    2: datasets.Features(
        {"chosen_ids": _IDS, "rejected_ids": _IDS, "prompt_len": _COUNT, "length": _COUNT}
    ),
    3: datasets.Features({"prompt_ids": _IDS, "length": _COUNT}),
}


@dataclass(frozen=True)
class Cut:
    """One prompt and its answers, short enough to be joined; `answers_cut` were shortened."""

    prompt: list[int]
    answers: list[list[int]]
    prompt_cut: bool
    answers_cut: int


def truncate(
    prompt: list[int], answers: Sequence[list[int]], max_len: int, bos_id: int | None
) -> Cut:
    """Cut one prompt and its answers so that the prompt and any one answer fit in `max_len`.

    An answer may take what the prompt leaves, or half of `max_len` if that is more; a longer one
    is cut on the right and still ends in its own last token. The prompt then gives way from the
    left, by the longest answer and alike for all of them, keeping a leading `bos_id`.
    """
    budget = max(max_len - len(prompt), max_len // 2)
    kept = [
        answer if len(answer) <= budget else [*answer[: budget - 1], answer[-1]]
        for answer in answers
    ]
    head = cut_left(prompt, max_len - max(map(len, kept)), bos_id)
    shortened = sum(len(answer) > budget for answer in answers)
    return Cut(head, kept, len(head) < len(prompt), shortened)


def cut_left(ids: list[int], max_len: int, bos_id: int | None) -> list[int]:
    """The last `max_len` ids, or a leading `bos_id` and the last `max_len - 1`."""
    if len(ids) <= max_len:
        return ids
    if bos_id is not None and ids[0] == bos_id and max_len > 0:
        return [bos_id, *ids[len(ids) - (max_len - 1) :]]
    return ids[len(ids) - max_len :]


def tokenise(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    phase: int,
    max_len: int,
    arrow_file: Path,
) -> tuple[datasets.Dataset, Counter[str]]:
    """Token rows of a phase (columns `FEATURES[phase]`) kept in `arrow_file`, and the counts.

    `max_len` is that of prompt and answer together, in phase 3 of the prompt. The counts are
    prompts_cut, answers_cut, identical_pairs and empty_answers, where there are any.
    """
    convert = {1: _sft_rows, 2: _pair_rows, 3: _prompt_rows}[phase]
    counts: Counter[str] = Counter()
    tokens = rows.map(
        partial(convert, tokenizer=tokenizer, max_len=max_len, counts=counts),
        batched=True,
        remove_columns=rows.column_names,
        features=FEATURES[phase],
        cache_file_name=str(arrow_file),
        # Always run, in this process: a reused result would leave the counts at zero.
        load_from_cache_file=False,
        new_fingerprint=arrow_file.stem,
        desc="tokenising",
    )
    return tokens, counts


def _sft_rows(
    batch: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    counts: Counter[str],
) -> dict[str, list[Any]]:
    prompts = encode(tokenizer, batch["prompt"])
    answers = encode_answers(tokenizer, batch["prompt"], prompts, batch["chosen"])
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES[1]}
    for prompt, answer in zip(prompts, answers, strict=True):
        if len(answer) == 1:  # the end token alone
            counts["empty_answers"] += 1
            continue
        cut = truncate(prompt, [answer], max_len, tokenizer.bos_token_id)
        counts["prompts_cut"] += cut.prompt_cut
        counts["answers_cut"] += cut.answers_cut
        columns["input_ids"].append(cut.prompt + cut.answers[0])
        columns["prompt_len"].append(len(cut.prompt))
        columns["length"].append(len(cut.prompt) + len(cut.answers[0]))
    return columns


def _pair_rows(
    batch: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    counts: Counter[str],
) -> dict[str, list[Any]]:
    prompts = encode(tokenizer, batch["prompt"])
    sides = [
        encode_answers(tokenizer, batch["prompt"], prompts, batch[side])
        for side in ("chosen", "rejected")
    ]
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES[2]}
    for prompt, *pair in zip(prompts, *sides, strict=True):
        cut = truncate(prompt, pair, max_len, tokenizer.bos_token_id)
        counts["prompts_cut"] += cut.prompt_cut
        counts["answers_cut"] += cut.answers_cut
        chosen, rejected = cut.answers
        if chosen == rejected:
            counts["identical_pairs"] += 1
            continue
        columns["chosen_ids"].append(cut.prompt + chosen)
        columns["rejected_ids"].append(cut.prompt + rejected)
        columns["prompt_len"].append(len(cut.prompt))
        columns["length"].append(len(cut.prompt) + max(len(chosen), len(rejected)))
    return columns


def _prompt_rows(
    batch: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    counts: Counter[str],
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES[3]}
    for ids, place in zip(encode(tokenizer, batch["prompt"]), batch["place"], strict=True):
        if not ids:
            raise UserError(f"{place}: the prompt gives no tokens to generate from; drop the row")
        kept = cut_left(ids, max_len, tokenizer.bos_token_id)
        counts["prompts_cut"] += len(kept) < len(ids)
        columns["prompt_ids"].append(kept)
        columns["length"].append(len(kept))
    return columns
