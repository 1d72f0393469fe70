"""Tokenised sets for the three phases: truncated, counted, cached as memory-mapped Arrow."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from dschat.data.cache import open_folder, written_once
from dschat.data.config import PHASES, SHORTEST, DataConfig, parse_proportions
from dschat.data.readers import format_by_name
from dschat.data.report import PHASE_NAMES, DataReport, SourceReport, nothing_left
from dschat.data.sources import digest
from dschat.data.store import Source, load_source, phase_split
from dschat.data.stream import RowStream, stream_sources
from dschat.data.tokenise import NEEDED, Converter, tokenise, tokenised_bytes
from dschat.errors import UserError
from dschat.text.chat_template import template_end
from dschat.text.encoding import tokenizer_fingerprint
from dschat.text.formats import choose_format
from dschat.utils.files import Reserve, in_words

# Part of every cached set's key: raise it when the same rows are to be tokenised differently.
RECIPE_VERSION = 6

# Proportions for sources of one's own, and for the sets that DeepSpeed-Chat names.
ALL_ROWS, NAMED_SPLIT = "1", "2,4,4"

# Cores of this process; below so many rows a further process takes longer to start than it saves.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_ROWS_PER_WORKER = 5_000


@dataclass(frozen=True)
class PromptData:
    """Token rows of one phase (columns: `tokenise.FEATURES`), and their counts by source."""

    train: datasets.Dataset | RowStream
    eval: datasets.Dataset
    report: DataReport
    key: str  # digest of the rows' content, tokenizer and recipe


def create_prompt_dataset(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    phase: int,
    *,
    seed: int,
    max_seq_len: int,
    max_prompt_len: int | None = None,
    once: Callable[[Callable[[], str]], str] | None = None,
    later: Reserve | None = None,
) -> PromptData:
    """Make the tokenised train and evaluation rows of a phase (1 answers, 2 pairs, 3 prompts).

    A phase trains on all train rows of a source, or on its share of them by `config.data_split`,
    and never on test rows. Prompts have the format that the tokenizer carries
    (`formats.set_format`). A set is tokenised once, also where independent runs want it together.

    Args:
        seed: of the splits and of the choice of `max_train_samples`.
        max_seq_len: tokens of prompt and answer together. max_prompt_len: of a phase-3 prompt.
        once: has one rank of each node do the work for all (`waiting.from_local_main`).
        later: what the run will write after the rows, for which they leave room.

    Raises:
        UserError: bad input, a disk that is too small, or no rows left.
    """
    if phase not in PHASES:
        raise ValueError(f"phase {phase} is none of {PHASES}")
    max_len = max_prompt_len if phase == 3 else max_seq_len
    if max_len is None:
        raise UserError("phase 3 (PPO prompts) needs max_prompt_len: give its length in tokens")
    lengths = {"max_seq_len": (max_seq_len, SHORTEST), "max_prompt_len": (max_prompt_len, 1)}
    for name, (value, least) in {**lengths, "seed": (seed, 0)}.items():
        if value is not None and value < least:
            wanted = f"at least {least}" if least else "0 or more"
            raise UserError(f"{name} is {value}: give {wanted}")
    form = choose_format(tokenizer)
    if form.name == "chat" and template_end(tokenizer) != tokenizer.eos_token:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r}: its eos_token {tokenizer.eos_token!r} does not "
            "end answers in its chat template; call set_format(tokenizer) first"
        )
    texts = config.train_on, config.keep_special_tokens
    convert = Converter(tokenizer, form, phase, max_len, *texts)
    named = [(n, NAMED_SPLIT if format_by_name(n) else ALL_ROWS) for n in config.data_path]
    sources = [(name, config.data_split or split) for name, split in named]
    if phase == 1:
        sources += [(name, ALL_ROWS) for name in config.sft_only_data_path]
    if config.streaming:
        return _stream(config, sources, convert, seed)
    numbers = [seed, [max_seq_len, max_prompt_len]]
    prepare = partial(_prepare, config, sources, convert, numbers, later)
    return _open(Path(prepare() if once is None else once(prepare)), config, phase, seed)


def _stream(
    config: DataConfig, sources: list[tuple[str, str]], convert: Converter, seed: int
) -> PromptData:
    """Tokenise the evaluation rows; those of training while they are read."""
    stream, evaluation, counts = stream_sources(
        sources, config.read, convert, seed, config.max_eval_samples
    )
    if not len(evaluation):
        raise UserError(nothing_left([counts], "eval", sources[0][1], convert.phase))
    report = DataReport(convert.phase, (counts,), None, len(evaluation))
    return PromptData(stream, evaluation, report, key="streamed")


def _prepare(
    config: DataConfig,
    names: list[tuple[str, str]],
    convert: Converter,
    numbers: list[Any],
    later: Reserve | None,
) -> str:
    """Find the folder of the tokenised set, written first if it is not there yet."""
    root, seed = open_folder(config.data_output_path), numbers[0]
    sources = [(load_source(name, seed, root, config.read), split) for name, split in names]
    contents = [[source.name, source.fingerprint, split] for source, split in sources]
    recipe = [RECIPE_VERSION, convert.phase, *numbers, contents, config.train_on]
    recipe += [convert.form.name, convert.keep_special_tokens]
    key = digest(tokenizer_fingerprint(convert.tokenizer), json.dumps(recipe))
    write = partial(_write, config, convert, seed, sources, later)
    return str(written_once(root, "sets", key, write))


def _open(folder: Path, config: DataConfig, phase: int, seed: int) -> PromptData:
    """Open a set, at most as many rows of it as asked; pairs get the number of their source."""
    sets = []
    for split, most in (("train", config.max_train_samples), ("eval", config.max_eval_samples)):
        files = sorted(folder.glob(f"{split}-*.arrow"))
        parts = [datasets.Dataset.from_file(str(file)) for file in files]
        if phase == 2:
            numbers = [int(file.stem.split("-")[1].split("_")[0]) for file in files]
            parts = [
                rows.add_column("source", np.full(len(rows), number, dtype=np.int32))
                for number, rows in zip(numbers, parts, strict=True)
            ]
        rows = datasets.concatenate_datasets(parts)
        if most is not None and most < len(rows):  # each source keeps its share
            rows = rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:most]))
        sets.append(rows)
    counts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    by_source = tuple(SourceReport(**of_source) for of_source in counts)
    train, evaluation = sets
    report = DataReport(phase, by_source, len(train), len(evaluation))
    return PromptData(train, evaluation, report, key=folder.name)


@dataclass(frozen=True)
class _Part:
    """Rows of one source and split that a phase gets; they are tokenised into `file`.

    The report counts the others, and what becomes of these once they are tokenised.
    """

    rows: datasets.Dataset
    report: SourceReport
    file: str


def _parts(sources: list[tuple[Source, str]], seed: int, phase: int) -> Iterator[_Part]:
    """Divide the rows of sources, each with its proportions, among the phases.

    Raises:
        UserError: rows without a column that the phase needs.
    """
    for number, (source, text) in enumerate(sources):
        for rows, column in product((source.train, source.test), NEEDED[phase]):
            values = rows.data.column(column)
            if values.null_count:
                first = pc.index(values.is_null(), True).as_py()
                raise UserError(
                    f"{rows.data.column('place')[first]} has no {column!r} ({values.null_count} of "
                    f"{len(values)} rows lack it), which phase {phase} ({PHASE_NAMES[phase]}) "
                    "needs; add the column or use another source"
                )
        chosen = phase_split(len(source.train), seed, parse_proportions(text), phase)
        train = source.train.select(np.sort(chosen))  # read from front to back
        others = {"held out": source.held_out, "for other steps": len(source.train) - len(train)}
        training = {"for training": len(source.train) if source.held_out else 0}
        for split, rows, left in (("train", train, others), ("eval", source.test, training)):
            skipped = source.skipped.get("train" if split == "train" else "test", {})
            report = SourceReport(source.name, split, len(rows), 0, skipped=skipped, left=left)
            yield _Part(rows, report, f"{split}-{number:03d}.arrow")


def _write(
    config: DataConfig,
    convert: Converter,
    seed: int,
    sources: list[tuple[Source, str]],
    later: Reserve | None,
    folder: Path,
) -> None:
    """Tokenise into `folder`: train-*.arrow, eval-*.arrow, a file each part, and report.json."""
    phase = convert.phase
    parts = list(_parts(sources, seed, phase))
    _check_room([part.rows for part in parts], convert, folder.parents[1], later)
    reports: list[SourceReport] = []
    for split in ("train", "eval"):  # no row to evaluate is tokenised where none would train
        for part in (part for part in parts if part.report.split == split):
            used, counts = 0, dict[str, Any]()
            if len(part.rows):
                by_size = min(_CORES, len(part.rows) // _ROWS_PER_WORKER)
                workers = config.preprocessing_num_workers or by_size
                used, counts = tokenise(part.rows, convert, folder / part.file, workers)
            reports.append(replace(part.report, used=used, **counts))
        if not any(report.used for report in reports if report.split == split):
            raise UserError(nothing_left(reports, split, sources[0][1], phase))
    (folder / "report.json").write_text(
        json.dumps([asdict(report) for report in reports], indent=1), encoding="utf-8"
    )


def _check_room(
    parts: Sequence[datasets.Dataset], convert: Converter, folder: Path, later: Reserve | None
) -> None:
    """Check that the disk of the cache has room for the rows once they are tokenised.

    Args:
        later: what the run writes after them.

    Raises:
        UserError: with the bytes needed and those free.
    """
    needed = sum(tokenised_bytes(rows, convert) for rows in parts)
    beside = later.on_disk_of(folder) if later is not None else 0
    free = shutil.disk_usage(folder).free
    if needed + beside > free:
        models = f", the models of the run {in_words(beside)}" if beside else ""
        raise UserError(
            f"data_output_path {folder}: the tokenised rows of phase {convert.phase} take about "
            f"{in_words(needed)}{models}, and {in_words(free)} are free on that disk; free some, "
            "or give a data_output_path on another disk"
        )
