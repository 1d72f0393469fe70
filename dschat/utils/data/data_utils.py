"""Tokenised sets for the three phases: cut to length, counted, cached as memory-mapped Arrow."""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.utils.data.formats import choose_format
from dschat.utils.data.raw_datasets import Source, load_source
from dschat.utils.data.report import PHASE_NAMES, DataReport, SourceReport, nothing_left
from dschat.utils.data.row_files import digest
from dschat.utils.data.sources import Reading
from dschat.utils.data.splits import PHASES, parse_proportions, phase_split
from dschat.utils.data.tokenise import TRAIN_ON, tokenise
from dschat.utils.model.tokenizer import tokenizer_fingerprint

# Part of every cached set's key: raise it when the same rows are to be tokenised differently.
RECIPE_VERSION = 2

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
        for name in ("max_prompt_len", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value} is too small: give 1 or more")


@dataclass(frozen=True)
class PromptData:
    """Token rows of one phase (columns: `tokenise.FEATURES`), and what became of every row."""

    train: datasets.Dataset
    eval: datasets.Dataset
    report: DataReport
    key: str  # digest of the rows' content, tokenizer and recipe


def create_prompt_dataset(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    phase: int,
    *,
    is_writer: bool = True,
    barrier: Callable[[], None] | None = None,
) -> PromptData:
    """Tokenised train and evaluation rows of a phase (1 answers, 2 pairs, 3 prompts).

    Every source's train rows are divided among the phases by `spec.data_split`; its test rows are
    evaluated on in every phase and never trained on. Prompts have the format that the tokenizer
    carries (`formats.choose_format`), which is settled here if it was not before. With several
    processes, `is_writer` holds on one per node, and the others read behind `barrier` what it
    wrote.

    Raises:
        UserError: bad input (on the writer, before the barrier), or no rows left.
    """
    choose_format(tokenizer)
    if is_writer:
        folder = _prepare(spec, tokenizer, phase, may_write=True)
    if barrier is not None:
        barrier()
    if not is_writer:
        folder = _prepare(spec, tokenizer, phase, may_write=False)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    sources = tuple(SourceReport(**counts) for counts in report)
    sets = {split: datasets.load_from_disk(str(folder / split)) for split in ("train", "eval")}
    train = _limit(sets["train"], spec.max_train_samples, spec.seed)
    evaluation = _limit(sets["eval"], spec.max_eval_samples, spec.seed)
    counts = DataReport(phase, sources, len(train), len(evaluation))
    return PromptData(train, evaluation, counts, key=folder.name)


def _limit(rows: datasets.Dataset, maximum: int | None, seed: int) -> datasets.Dataset:
    """A seeded choice of at most `maximum` rows, so that every source keeps its share."""
    if maximum is None or maximum >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:maximum]))


def _prepare(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, phase: int, *, may_write: bool
) -> Path:
    """The folder of the tokenised set, written first if it is not there yet."""
    if phase not in PHASES:
        raise ValueError(f"phase {phase} is none of {PHASES}")
    if phase == 3 and spec.max_prompt_len is None:
        raise UserError("phase 3 (PPO prompts) needs --max_prompt_len: give its length in tokens")
    root = Path(spec.data_output_path).expanduser()
    only = spec.sft_only_data_path if phase == 1 else ()
    sources = [
        (load_source(name, spec.seed, root / "sources", spec.reading), proportions)
        for names, proportions in ((spec.data_path, spec.data_split), (only, "1"))
        for name in names
    ]
    folder = root / _key(sources, spec, tokenizer, phase)
    if folder.is_dir():
        return folder
    if not may_write:
        raise RuntimeError(f"{folder} was not written: data or tokenizer differ between processes")
    for source, _ in sources:
        _require_columns(source, phase)
    # Renamed when whole, so a folder under the final name is never half-written.
    part = root / f"{folder.name}.{uuid.uuid4().hex}.tmp"
    try:
        part.mkdir()
    except OSError as error:
        raise UserError(
            f"{root} cannot be written ({error.strerror}): give another --data_output_path"
        ) from error
    try:
        _write(part, sources, spec, tokenizer, phase)
        try:
            os.rename(part, folder)
        except OSError:
            # Another writer was first with the same content: its folder serves.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


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
    """Tokenise into `folder`: train/, eval/ and report.json."""
    reports: list[SourceReport] = []
    max_len = spec.max_prompt_len if phase == 3 else spec.max_seq_len
    for split in ("train", "eval"):
        parts = []
        for number, (source, text) in enumerate(sources):
            rows = source.test
            if split == "train":
                chosen = phase_split(len(source.train), spec.seed, parse_proportions(text), phase)
                rows = source.train.select(chosen)
            skipped = source.skipped.get("train" if split == "train" else "test", {})
            report = SourceReport(source.name, split, len(rows), 0, skipped=skipped)
            if len(rows):
                part = folder / f"{split}-{number}.arrow"
                tokens, counts = tokenise(rows, tokenizer, phase, max_len, part, spec.train_on)
                parts.append(tokens)
                report = replace(report, used=len(tokens), **counts)
            reports.append(report)
        if not sum(map(len, parts)):
            raise UserError(nothing_left(reports, split, spec.data_split, phase))
        datasets.concatenate_datasets(parts).save_to_disk(str(folder / split))
    for part in folder.glob("*.arrow"):
        part.unlink()
    (folder / "report.json").write_text(
        json.dumps([asdict(report) for report in reports], indent=1), encoding="utf-8"
    )
