"""Examples to token rows: encode, truncate with the end token kept, drop and count."""

import gc
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from dschat.data.store import examples_of
from dschat.errors import UserError
from dschat.text.conversations import MARKER, Example
from dschat.text.encoding import (
    encode,
    encode_answers,
    encode_turns,
    join_turns,
    shift_spans,
    truncate,
    truncate_left,
)
from dschat.text.formats import PromptFormat
from dschat.text.ordinary import ordinary_examples

Columns = dict[str, list[Any]]
SAMPLE = 200  # rows of a source and split, from which the size of all is estimated

_IDS, _COUNT = datasets.List(datasets.Value("int32")), datasets.Value("int32")
# `length` is that of the longest sequence of a row: loaders group by it without reading tokens.
# `trained` holds the token spans that are targets, flat: start, stop, start, stop, ...; an answer's
# end token is in its span. `columns` holds the row's own, a JSON object; null where none are kept.
FEATURES = {
    1: datasets.Features(
        {"input_ids": _IDS, "trained": _IDS, "prompt_len": _COUNT, "length": _COUNT}
    ),
    2: datasets.Features(
        {
            **{"chosen_ids": _IDS, "rejected_ids": _IDS, "prompt_len": _COUNT, "length": _COUNT},
            **{"margin": datasets.Value("float64"), "subset": datasets.Value("string")},
        }
    ),
    3: datasets.Features(
        {"prompt_ids": _IDS, "length": _COUNT, "columns": datasets.Value("string")}
    ),
}
# Columns of an example that a phase cannot do without.
NEEDED = {1: ("chosen",), 2: ("chosen", "rejected"), 3: ()}


@dataclass(frozen=True)
class Converter:
    """Makes token rows of a phase out of examples.

    Names of special tokens in their texts are ordinary text, unless `keep_special_tokens`.
    """

    tokenizer: PreTrainedTokenizerBase
    form: PromptFormat
    phase: int
    max_len: int
    train_on: str | None
    keep_special_tokens: bool = False

    def __call__(self, examples: list[Example], counts: Counter[str]) -> Columns:
        """Tokenise examples into columns of `FEATURES`; add what is cut and dropped to `counts`."""
        if not self.keep_special_tokens:
            examples, count = ordinary_examples(self.tokenizer, examples)
            counts["special_names"] += count
        texts = [e.prompt for e in examples if isinstance(e.prompt, str)]
        is_raw = self.form.name == "raw"  # which takes no text for a question
        transcripts = sum(is_raw or MARKER.search(text) is not None for text in texts)
        counts["transcripts"] += transcripts
        counts["questions"] += len(texts) - transcripts
        make = {1: self._sft_rows, 2: self._pair_rows, 3: self._prompt_rows}[self.phase]
        # Lists of numbers by the thousand and no cycle: the collector would read them for nothing.
        collects = gc.isenabled()
        gc.disable()
        try:
            return make(examples, counts)
        finally:
            if collects:
                gc.enable()

    def _sft_rows(self, examples: list[Example], counts: Counter[str]) -> Columns:
        turns, says_nothing = [], []
        for e in examples:
            # White space is an answer where texts are taken as they stand, and there alone.
            says_nothing.append(self.form.name != "raw" and not (e.chosen or "").strip())
            trains_last = self.train_on == "last_turn"
            trains_last |= self.train_on is None and not e.train_all_turns
            try:
                opened = self.form.prompt(e.prompt)
                answer = self.form.answer(e.prompt, opened, e.chosen or "")
                pieces = [opened] if trains_last else self.form.earlier(e.prompt)
            except UserError as error:
                raise UserError(f"{e.place}: {error}") from error
            turns.append(list(zip(pieces[::2], [*pieces[1::2], answer], strict=True)))
        columns: Columns = {name: [] for name in FEATURES[1]}
        bos_id = self.tokenizer.bos_token_id
        rows = encode_turns(self.tokenizer, turns, self.form.adds_special)
        for pairs, is_empty in zip(rows, says_nothing, strict=True):
            prompt, spans = join_turns(pairs)
            answer_ids = pairs[-1][1]
            if is_empty or len(answer_ids) == 1:  # the end token alone
                counts["empty_answers"] += 1
                continue
            short = truncate(prompt, [answer_ids], self.max_len, bos_id)
            kept = shift_spans(spans, len(prompt) - len(short.prompt))
            counts["prompts_cut"] += short.prompt_cut
            counts["answers_cut"] += short.answers_cut
            counts["turns_cut"] += (len(spans) - len(kept)) // 2
            start, length = len(short.prompt), len(short.prompt) + len(short.answers[0])
            columns["input_ids"].append(short.prompt + short.answers[0])
            columns["trained"].append([*kept, start, length])
            columns["prompt_len"].append(start)
            columns["length"].append(length)
        return columns

    def encoded(
        self, examples: Sequence[Example], sides: Sequence[str]
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Encode prompts, and the answers of each side after them, none of them truncated."""
        opened: list[str] = []
        texts: dict[str, list[str]] = {side: [] for side in sides}
        for e in examples:
            try:
                opened.append(self.form.prompt(e.prompt))
                for side in sides:
                    answer = self.form.answer(e.prompt, opened[-1], getattr(e, side))
                    texts[side].append(answer)
            except UserError as error:
                raise UserError(f"{e.place}: {error}" if e.place else str(error)) from error
        tokenizer, special = self.tokenizer, self.form.adds_special
        ids = encode(tokenizer, opened, special)
        return ids, [
            encode_answers(tokenizer, opened, ids, answers, special) for answers in texts.values()
        ]

    def _pair_rows(self, examples: list[Example], counts: Counter[str]) -> Columns:
        ids, sides = self.encoded(examples, ("chosen", "rejected"))
        columns: Columns = {name: [] for name in FEATURES[2]}
        bos_id = self.tokenizer.bos_token_id
        for e, prompt, *pair in zip(examples, ids, *sides, strict=True):
            short = truncate(prompt, pair, self.max_len, bos_id)
            counts["prompts_cut"] += short.prompt_cut
            counts["answers_cut"] += short.answers_cut
            chosen, rejected = short.answers
            if chosen == rejected:
                counts["identical_pairs"] += 1
                continue
            columns["chosen_ids"].append(short.prompt + chosen)
            columns["rejected_ids"].append(short.prompt + rejected)
            columns["prompt_len"].append(len(short.prompt))
            columns["length"].append(len(short.prompt) + max(len(chosen), len(rejected)))
            counts["margins"] += e.margin is not None
            counts["one_sided"] += min(map(len, pair)) == 1  # the end token alone
            columns["margin"].append(e.margin)
            columns["subset"].append(e.subset)
        return columns

    def _prompt_rows(self, examples: list[Example], counts: Counter[str]) -> Columns:
        columns: Columns = {name: [] for name in FEATURES[3]}
        bos_id = self.tokenizer.bos_token_id
        encoded, _ = self.encoded(examples, ())
        for e, ids in zip(examples, encoded, strict=True):
            if not ids:
                raise UserError(
                    f"{e.place}: the prompt gives no tokens to generate from; drop the row"
                )
            kept = truncate_left(ids, self.max_len, bos_id)
            counts["prompts_cut"] += len(kept) < len(ids)
            columns["prompt_ids"].append(kept)
            columns["length"].append(len(kept))
            columns["columns"].append(e.columns)
        return columns


def tokenised_bytes(rows: datasets.Dataset, convert: Converter) -> int:
    """Estimate the bytes of rows once they are tokenised, from some that lie at even distances."""
    if not len(rows):
        return 0
    places = np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).round().astype(int)
    columns = convert(examples_of(rows[places]), Counter())
    table = datasets.Dataset.from_dict(columns, FEATURES[convert.phase]).data
    return round(table.nbytes / len(places) * len(rows))


def tokenise(
    rows: datasets.Dataset, convert: Converter, arrow_file: Path, workers: int = 1
) -> tuple[int, Counter[str]]:
    """Write the token rows of stored rows; return how many there are, and the counts.

    They are in `arrow_file`, or with several workers in one file for each, in the order of their
    names, which begin with its stem. The counts are those of `report.SourceReport`.
    """
    counts = arrow_file.with_suffix(".counts")
    counts.mkdir()
    if datasets.are_progress_bars_disabled():  # where there is no terminal: a line instead
        print(f"tokenising {len(rows):,} rows", file=sys.stderr, flush=True)
    try:
        tokens = rows.map(
            partial(_counted, folder=counts, convert=convert),
            batched=True,
            remove_columns=rows.column_names,
            features=FEATURES[convert.phase],
            cache_file_name=str(arrow_file),
            # Always run: a reused result would leave the counts at zero.
            load_from_cache_file=False,
            new_fingerprint=arrow_file.stem,
            num_proc=min(workers, len(rows)) if workers > 1 else None,
            desc="tokenising",
        )
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise UserError(
            f"tokenising: one of {workers} processes was killed, most likely for memory; give a "
            "smaller preprocessing_num_workers"
        ) from error
    total: Counter[str] = Counter()
    for file in counts.iterdir():
        for line in file.read_text(encoding="utf-8").splitlines():
            total.update(json.loads(line))
    shutil.rmtree(counts)
    return len(tokens), total


def _counted(batch: Columns, folder: Path, convert: Converter) -> Columns:
    """Tokenise one batch; its counts go to a file in `folder` that this process has to itself."""
    counts: Counter[str] = Counter()
    rows = convert(examples_of(batch), counts)
    with (folder / str(os.getpid())).open("a", encoding="utf-8") as file:
        file.write(json.dumps(counts) + "\n")
    return rows
