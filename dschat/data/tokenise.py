"""Text rows to token rows: encode, cut to length with the end token kept, drop and count."""

import contextlib
import gc
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
from transformers import PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.text.conversations import Prompt, Turn
from dschat.text.encoding import encode, encode_answers, encode_turns
from dschat.text.formats import PromptFormat, choose_format

Batch = dict[str, list[Any]]
T = TypeVar("T")

_IDS, _COUNT = datasets.List(datasets.Value("int32")), datasets.Value("int32")
# `length` is that of the longest sequence of a row: loaders group by it without reading tokens.
# `trained` holds the token spans that are targets, flat: start, stop, start, stop, ...; an answer's
# end token is in its span.
FEATURES = {
    1: datasets.Features(
        {"input_ids": _IDS, "trained": _IDS, "prompt_len": _COUNT, "length": _COUNT}
    ),
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


@dataclass(frozen=True)
class _Recipe:
    """What makes token rows out of text rows."""

    tokenizer: PreTrainedTokenizerBase
    form: PromptFormat
    max_len: int
    train_on: str | None

    @cached_property
    def bos_id(self) -> int | None:
        """Looked up once: transformers takes microseconds for it."""
        return self.tokenizer.bos_token_id

    def prompts(self, batch: Batch) -> list[tuple[Prompt, str]]:
        """Each row's prompt and its text."""
        pairs = []
        for text, turns, place in zip(batch["prompt"], batch["turns"], batch["place"], strict=True):
            prompt = text if turns is None else tuple(Turn(t["role"], t["text"]) for t in turns)
            pairs.append((prompt, _at(place, self.form.prompt, prompt)))
        return pairs

    def answers(self, batch: Batch, side: str, prompts: list[tuple[Prompt, str]]) -> list[str]:
        """The texts of one side's answers."""
        rows = zip(batch["place"], prompts, batch[side], strict=True)
        return [_at(place, self.form.answer, *prompt, text) for place, prompt, text in rows]

    def pieces(self, prompt: tuple[Prompt, str], whole: bool, place: str) -> list[str]:
        """A prompt's text, cut where answers that train begin and end, if there are any."""
        if self.train_on == "last_turn" or (self.train_on is None and not whole):
            return [prompt[1]]
        return _at(place, self.form.earlier, prompt[0])

    def cut(self, prompt: list[int], answers: list[list[int]], counts: Counter[str]) -> Cut:
        """`truncate` to the longest allowed, counted."""
        cut = truncate(prompt, answers, self.max_len, self.bos_id)
        counts["prompts_cut"] += cut.prompt_cut
        counts["answers_cut"] += cut.answers_cut
        return cut


def _at(place: str, function: Callable[..., T], *args: Any) -> T:
    """What a function of a format returns; its errors name the row."""
    try:
        return function(*args)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def tokenise(
    rows: datasets.Dataset,
    convert: Callable[[Batch, Counter[str]], Batch],
    features: datasets.Features,
    arrow_file: Path,
    workers: int = 1,
) -> tuple[int, Counter[str]]:
    """Write the token rows that `convert` makes; return how many there are, and the counts.

    They are in `arrow_file`, or with several workers in one file for each, in the order of their
    names, which begin with its stem. The counts are prompts_cut, answers_cut, turns_cut,
    identical_pairs and empty_answers, where there are any.
    """
    counts = _Counts(arrow_file.with_suffix(".counts"))
    try:
        tokens = rows.map(
            partial(_counted, counts=counts, convert=convert),
            batched=True,
            remove_columns=rows.column_names,
            features=features,
            cache_file_name=str(arrow_file),
            # Always run: a reused result would leave the counts at zero.
            load_from_cache_file=False,
            new_fingerprint=arrow_file.stem,
            num_proc=workers if workers > 1 else None,
            desc="tokenising",
        )
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise UserError(
            f"tokenising: one of {workers} processes was killed, most likely for memory; give a "
            "smaller --preprocessing_num_workers"
        ) from error
    return len(tokens), counts.total()


def converter(
    tokenizer: PreTrainedTokenizerBase, phase: int, max_len: int, train_on: str | None
) -> Callable[[Batch, Counter[str]], Batch]:
    """What makes token rows of a batch of text rows, adding to the counts that it is given."""
    recipe = _Recipe(tokenizer, choose_format(tokenizer), max_len, train_on)
    convert = {1: _sft_rows, 2: _pair_rows, 3: _prompt_rows}[phase]
    return partial(_converted, convert=convert, recipe=recipe)


def _converted(
    batch: Batch, counts: Counter[str], convert: Callable[..., Batch], recipe: _Recipe
) -> Batch:
    # Lists of numbers by the thousand and no cycle: the collector would read them all for nothing.
    with _uncollected():
        return convert(batch, recipe, counts)


@dataclass(frozen=True)
class _Counts:
    """Counts of any number of processes: each adds lines to a file of its own in `folder`."""

    folder: Path

    def add(self, counts: Counter[str]) -> None:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / str(os.getpid())).open("a", encoding="utf-8") as file:
            file.write(json.dumps(counts) + "\n")

    def total(self) -> Counter[str]:
        """Their sum; the files go."""
        total: Counter[str] = Counter()
        for file in self.folder.iterdir():
            for line in file.read_text(encoding="utf-8").splitlines():
                total.update(json.loads(line))
        shutil.rmtree(self.folder)
        return total


def _counted(
    batch: Batch, counts: _Counts, convert: Callable[[Batch, Counter[str]], Batch]
) -> Batch:
    """The token rows of one batch; what was cut and dropped in it is added to the counts."""
    here: Counter[str] = Counter()
    rows = convert(batch, here)
    counts.add(here)
    return rows


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Python's collector of cycles is off meanwhile."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _sft_rows(batch: Batch, recipe: _Recipe, counts: Counter[str]) -> Batch:
    prompts = recipe.prompts(batch)
    answers = recipe.answers(batch, "chosen", prompts)
    turns = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        pieces = recipe.pieces(prompt, batch["whole"][row], batch["place"][row])
        turns.append(list(zip(pieces[::2], [*pieces[1::2], answer], strict=True)))
    columns: Batch = {name: [] for name in FEATURES[1]}
    for pairs in encode_turns(recipe.tokenizer, turns, recipe.form.adds_special):
        prompt, spans = _joined(pairs)
        answer = pairs[-1][1]
        if len(answer) == 1:  # the end token alone
            counts["empty_answers"] += 1
            continue
        cut = recipe.cut(prompt, [answer], counts)
        kept = shift_spans(spans, len(prompt) - len(cut.prompt))
        counts["turns_cut"] += (len(spans) - len(kept)) // 2
        start, length = len(cut.prompt), len(cut.prompt) + len(cut.answers[0])
        columns["input_ids"].append(cut.prompt + cut.answers[0])
        columns["trained"].append([*kept, start, length])
        columns["prompt_len"].append(start)
        columns["length"].append(length)
    return columns


def _joined(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
    """Ids of all before the last answer, and the spans of earlier answers that say something."""
    ids: list[int] = []
    spans: list[int] = []
    for context, answer in pairs[:-1]:
        ids += context
        if len(answer) > 1:
            spans += [len(ids), len(ids) + len(answer)]
        ids += answer
    return ids + pairs[-1][0], spans


def shift_spans(spans: list[int], shift: int) -> list[int]:
    """Spans of a prompt that lost `shift` tokens on the left, without those that are not whole.

    An answer that lost its beginning is context like any other text: it would be learnt as the
    answer to nothing. The token in front of an answer must be there too, since it predicts it.
    """
    if not shift:
        return spans
    return [
        bound - shift
        for start, stop in zip(spans[::2], spans[1::2], strict=True)
        if start > shift
        for bound in (start, stop)
    ]


def _pair_rows(batch: Batch, recipe: _Recipe, counts: Counter[str]) -> Batch:
    prompts = recipe.prompts(batch)
    opened = [text for _, text in prompts]
    ids = encode(recipe.tokenizer, opened, recipe.form.adds_special)
    sides = []
    for side in ("chosen", "rejected"):
        texts = recipe.answers(batch, side, prompts)
        special = recipe.form.adds_special
        sides.append(encode_answers(recipe.tokenizer, opened, ids, texts, special))
    columns: Batch = {name: [] for name in FEATURES[2]}
    for prompt, *pair in zip(ids, *sides, strict=True):
        cut = recipe.cut(prompt, pair, counts)
        chosen, rejected = cut.answers
        if chosen == rejected:
            counts["identical_pairs"] += 1
            continue
        columns["chosen_ids"].append(cut.prompt + chosen)
        columns["rejected_ids"].append(cut.prompt + rejected)
        columns["prompt_len"].append(len(cut.prompt))
        columns["length"].append(len(cut.prompt) + max(len(chosen), len(rejected)))
    return columns


def _prompt_rows(batch: Batch, recipe: _Recipe, counts: Counter[str]) -> Batch:
    columns: Batch = {name: [] for name in FEATURES[3]}
    opened = [text for _, text in recipe.prompts(batch)]
    all_ids = encode(recipe.tokenizer, opened, recipe.form.adds_special)
    for ids, place in zip(all_ids, batch["place"], strict=True):
        if not ids:
            raise UserError(f"{place}: the prompt gives no tokens to generate from; drop the row")
        kept = cut_left(ids, recipe.max_len, recipe.tokenizer.bos_token_id)
        counts["prompts_cut"] += len(kept) < len(ids)
        columns["prompt_ids"].append(kept)
        columns["length"].append(len(kept))
    return columns
