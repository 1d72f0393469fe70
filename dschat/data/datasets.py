"""Tokenised sets for the three phases: cut to length, counted, cached as memory-mapped Arrow."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from dschat.data.cache import written_once
from dschat.data.files import digest
from dschat.data.registry import Reading
from dschat.data.report import PHASE_NAMES, DataReport, SourceReport, nothing_left
from dschat.data.sources import Source, load_source, stream_source
from dschat.data.splits import PHASES, parse_proportions, phase_split
from dschat.data.stream import RowStream, columns_of, complete, in_turns, rows_of_phase
from dschat.data.tokenise import FEATURES, TRAIN_ON, converter, tokenise
from dschat.errors import UserError
from dschat.text.formats import choose_format
from dschat.text.tokenizer import tokenizer_fingerprint

# Part of every cached set's key: raise it when the same rows are to be tokenised differently.
RECIPE_VERSION = 3

# Below so many rows a further process takes longer to start than it saves.
_ROWS_PER_WORKER = 5_000
# Of a stream, unless --max_eval_samples says otherwise: they are in memory.
_STREAMED_EVAL_ROWS = 1_000

NEEDED_COLUMNS = {1: ("chosen",), 2: ("chosen", "rejected"), 3: ()}


@dataclass(frozen=True)
class DataSpec:
    """What to read and how to cut it; lengths in tokens, `max_prompt_len` for phase 3 alone."""

    data_path: tuple[str, ...]
    data_split: str
    data_output_path: str
    seed: int
    max_seq_len: int
    sft_only_data_path: tuple[str, ...] = ()
    max_prompt_len: int | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    reading: Reading = Reading()
    train_on: str | None = None
    streaming: bool = False  # tokenise while reading, keep nothing
    workers: int | None = None  # processes that tokenise; None: `choose_workers`

    def __post_init__(self) -> None:
        parse_proportions(self.data_split)
        if not self.data_path and not self.sft_only_data_path:
            raise UserError("--data_path is empty: name at least one source")
        # Below four tokens a truncated row could hold no prompt or no answer beside its end token.
        if self.max_seq_len < 4:
            raise UserError(f"--max_seq_len {self.max_seq_len} is too small: give 4 or more")
        if self.train_on not in (None, *TRAIN_ON):
            raise UserError(f"--train_on {self.train_on}: give one of {', '.join(TRAIN_ON)}")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} is negative: give 0 or more")
        if self.workers is not None and self.workers < 1:
            raise UserError(
                f"--preprocessing_num_workers {self.workers} is too small: give 1 or more"
            )
        for name in ("max_prompt_len", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value} is too small: give 1 or more")


@dataclass(frozen=True)
class PromptData:
    """Token rows of one phase (columns: `tokenise.FEATURES`), and what became of every row."""

    train: datasets.Dataset | RowStream
    eval: datasets.Dataset
    report: DataReport
    key: str  # digest of the rows' content, tokenizer and recipe


def create_prompt_dataset(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    phase: int,
    *,
    once: Callable[[Callable[[], str]], str] | None = None,
) -> PromptData:
    """Tokenised train and evaluation rows of a phase (1 answers, 2 pairs, 3 prompts).

    Every source's train rows are divided among the phases by `spec.data_split`; its test rows are
    evaluated on in every phase and never trained on. Prompts have the format that the tokenizer
    carries (`formats.choose_format`), which is settled here if it was not before. A set is
    tokenised once by one process, also when independent runs want it at the same time. With
    several ranks, `once` makes its work done by one of each node and gives all of them the result
    (`distributed.from_local_main`).

    Raises:
        UserError: bad input, a full disk, or no rows left.
    """
    choose_format(tokenizer)
    if phase not in PHASES:
        raise ValueError(f"phase {phase} is none of {PHASES}")
    if phase == 3 and spec.max_prompt_len is None:
        raise UserError("phase 3 (PPO prompts) needs --max_prompt_len: give its length in tokens")

    if spec.streaming:
        return stream_prompt_dataset(spec, tokenizer, phase)

    def prepare() -> str:
        return str(_prepare(spec, tokenizer, phase))

    folder = Path(prepare() if once is None else once(prepare))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    sources = tuple(SourceReport(**counts) for counts in report)
    train, evaluation = (_read(folder, split) for split in ("train", "eval"))
    train = _limit(train, spec.max_train_samples, spec.seed)
    evaluation = _limit(evaluation, spec.max_eval_samples, spec.seed)
    counts = DataReport(phase, sources, len(train), len(evaluation))
    return PromptData(train, evaluation, counts, key=folder.name)


def stream_prompt_dataset(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, phase: int
) -> PromptData:
    """Train rows that are tokenised as they are read, and a set of the first test rows."""
    only = spec.sft_only_data_path if phase == 1 else ()
    trained, tested, skipped = [], [], Counter()
    for names, text in ((spec.data_path, spec.data_split), (only, "1")):
        for name in names:
            train, test = stream_source(name, spec.reading, skipped)
            if test is None:
                raise UserError(
                    f"--streaming: {name} has no test rows, and none can be held out of a stream; "
                    "put a test file beside the train file, or drop --streaming"
                )
            trained.append((train, parse_proportions(text)))
            tested.append(test)

    def read() -> Iterator[dict[str, Any]]:
        parts = [rows_of_phase(train(), spec.seed, share, phase) for train, share in trained]
        return complete(in_turns(parts), NEEDED_COLUMNS[phase], phase)

    max_len = spec.max_prompt_len if phase == 3 else spec.max_seq_len
    convert, counts = converter(tokenizer, phase, max_len, spec.train_on), Counter()
    limit = spec.max_eval_samples or _STREAMED_EVAL_ROWS
    parts = in_turns([test() for test in tested])
    rows = list(complete(islice(parts, limit), NEEDED_COLUMNS[phase], phase))
    if not rows:
        raise UserError("--streaming: the test files hold no rows; give at least one")
    evaluation = datasets.Dataset.from_dict(convert(columns_of(rows), counts), FEATURES[phase])
    names = ", ".join((*spec.data_path, *only))
    told = SourceReport(names, "eval", len(rows), len(evaluation), skipped=dict(skipped), **counts)
    if not len(evaluation):
        raise UserError(nothing_left([told], "eval", spec.data_split, phase))
    report = DataReport(phase, (told,), None, len(evaluation))
    return PromptData(RowStream(read, convert, skipped), evaluation, report, key="streamed")


def _read(folder: Path, split: str) -> datasets.Dataset:
    """The rows of all its files, memory-mapped."""
    files = sorted(folder.glob(f"{split}-*.arrow"))
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])


def _limit(rows: datasets.Dataset, maximum: int | None, seed: int) -> datasets.Dataset:
    """A seeded choice of at most `maximum` rows, so that every source keeps its share."""
    if maximum is None or maximum >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:maximum]))


def _prepare(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, phase: int) -> Path:
    """The folder of the tokenised set, written first if it is not there yet."""
    root = Path(spec.data_output_path).expanduser()
    only = spec.sft_only_data_path if phase == 1 else ()
    sources = [
        (load_source(name, spec.seed, root / "sources", spec.reading), proportions)
        for names, proportions in ((spec.data_path, spec.data_split), (only, "1"))
        for name in names
    ]

    def write(folder: Path) -> None:
        for source, _ in sources:
            _require_columns(source, phase)
        _write(folder, sources, spec, tokenizer, phase)

    return written_once(root, _key(sources, spec, tokenizer, phase), write)


def _key(
    sources: list[tuple[Source, str]],
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    phase: int,
) -> str:
    contents = [[source.name, source.fingerprint, split] for source, split in sources]
    lengths = [spec.max_seq_len, spec.max_prompt_len]
    recipe = [RECIPE_VERSION, phase, spec.seed, lengths, contents, spec.train_on]
    return digest(tokenizer_fingerprint(tokenizer), json.dumps(recipe))


def _require_columns(source: Source, phase: int) -> None:
    for rows in (source.train, source.test):
        for column in NEEDED_COLUMNS[phase]:
            values = rows.data.column(column)
            if values.null_count:
                first = pc.index(values.is_null(), True).as_py()
                raise UserError(
                    f"{source.name}: {rows.data.column('place')[first]} has no {column!r} "
                    f"({values.null_count} of {len(values)} rows lack it), which phase {phase} "
                    f"({PHASE_NAMES[phase]}) needs; add the column or use another source"
                )


def _write(
    folder: Path,
    sources: list[tuple[Source, str]],
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    phase: int,
) -> None:
    """Tokenise into the new `folder`: train-*.arrow, eval-*.arrow and report.json."""
    folder.mkdir()
    reports: list[SourceReport] = []
    max_len = spec.max_prompt_len if phase == 3 else spec.max_seq_len
    for split in ("train", "eval"):
        for number, (source, text) in enumerate(sources):
            rows = source.test
            if split == "train":
                chosen = phase_split(len(source.train), spec.seed, parse_proportions(text), phase)
                rows = source.train.select(np.sort(chosen))  # read from front to back
            skipped = source.skipped.get("train" if split == "train" else "test", {})
            report = SourceReport(source.name, split, len(rows), 0, skipped=skipped)
            if len(rows):
                part = folder / f"{split}-{number:03d}.arrow"
                workers = choose_workers(spec.workers, len(rows))
                used, counts = tokenise(
                    rows, tokenizer, phase, max_len, part, spec.train_on, workers
                )
                report = replace(report, used=used, **counts)
            reports.append(report)
        if not any(report.used for report in reports if report.split == split):
            raise UserError(nothing_left(reports, split, spec.data_split, phase))
    (folder / "report.json").write_text(
        json.dumps([asdict(report) for report in reports], indent=1), encoding="utf-8"
    )


def choose_workers(asked: int | None, rows: int) -> int:
    """Processes to tokenise so many rows: as asked for, else by rows and cores."""
    if asked is not None:
        return min(asked, rows)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, rows // _ROWS_PER_WORKER))
