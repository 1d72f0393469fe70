"""Tokenised sets for the three phases: truncated, counted, cached as memory-mapped Arrow."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from dschat.data.config import PHASES, SHORTEST, DataConfig, parse_proportions, phase_split
from dschat.data.report import PHASE_NAMES, DataReport, SourceReport, nothing_left
from dschat.data.sources import digest
from dschat.data.store import Source, load_source, stream_source, written_once
from dschat.data.stream import RowStream, complete, in_turns, rows_of_phase
from dschat.data.tokenise import FEATURES, Converter, tokenise
from dschat.errors import UserError
from dschat.text.conversations import Example
from dschat.text.encoding import tokenizer_fingerprint
from dschat.text.formats import choose_format, template_end

# Part of every cached set's key: raise it when the same rows are to be tokenised differently.
RECIPE_VERSION = 3

# Below so many rows a further process takes longer to start than it saves.
_ROWS_PER_WORKER = 5_000
# Of a stream, unless --max_eval_samples says otherwise: they are in memory.
_STREAMED_EVAL_ROWS = 1_000

NEEDED_COLUMNS = {1: ("chosen",), 2: ("chosen", "rejected"), 3: ()}


@dataclass(frozen=True)
class PromptData:
    """Token rows of one phase (columns: `tokenise.FEATURES`), and their counts by source."""

    train: datasets.Dataset | RowStream
    eval: datasets.Dataset
    report: DataReport
    key: str  # digest of the rows' content, tokenizer and recipe


@dataclass(frozen=True)
class _Request:
    """One tokenised set: its data, its phase, and its lengths in tokens."""

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    phase: int
    seed: int
    max_seq_len: int
    max_prompt_len: int | None

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"phase {self.phase} is none of {PHASES}")
        if self.phase == 3 and self.max_prompt_len is None:
            raise UserError("phase 3 (PPO prompts) needs max_prompt_len: give its length in tokens")
        if self.max_seq_len < SHORTEST:
            raise UserError(f"max_seq_len is {self.max_seq_len}: give at least {SHORTEST}")
        if self.max_prompt_len is not None and self.max_prompt_len < 1:
            raise UserError(f"max_prompt_len is {self.max_prompt_len}: give at least 1")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: give 0 or more")

    def converter(self) -> Converter:
        """Make the function from examples to token rows."""
        max_len = self.max_prompt_len if self.phase == 3 else self.max_seq_len
        assert max_len is not None
        form = choose_format(self.tokenizer)
        return Converter(self.tokenizer, form, self.phase, max_len, self.config.train_on)


def create_prompt_dataset(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    phase: int,
    *,
    seed: int,
    max_seq_len: int,
    max_prompt_len: int | None = None,
    once: Callable[[Callable[[], str]], str] | None = None,
) -> PromptData:
    """Make the tokenised train and evaluation rows of a phase (1 answers, 2 pairs, 3 prompts).

    Every source's train rows are divided among the phases by `config.data_split`; its test rows are
    evaluated on in every phase and never trained on. Prompts have the format that the tokenizer
    carries (`formats.set_format`). A set is tokenised once by one process, also when independent
    runs want it at the same time.

    Args:
        seed: of the splits and of the choice of `max_train_samples`.
        max_seq_len: tokens of prompt and answer together.
        max_prompt_len: tokens of a prompt, in phase 3 alone.
        once: has the work done by one rank of each node and gives its result to all of them
            (`distributed.from_local_main`).

    Raises:
        UserError: bad input, a full disk, or no rows left.
    """
    if choose_format(tokenizer).name == "chat" and template_end(tokenizer) != tokenizer.eos_token:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r}: its eos_token {tokenizer.eos_token!r} does not "
            "end answers in its chat template; call set_format(tokenizer) first"
        )
    request = _Request(config, tokenizer, phase, seed, max_seq_len, max_prompt_len)
    if config.streaming:
        return _stream(request)

    prepare = partial(_prepare, request)
    folder = Path(prepare() if once is None else once(prepare))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    sources = tuple(SourceReport(**counts) for counts in report)
    train = _read(folder, "train", config.max_train_samples, seed)
    evaluation = _read(folder, "eval", config.max_eval_samples, seed)
    counts = DataReport(phase, sources, len(train), len(evaluation))
    return PromptData(train, evaluation, counts, key=folder.name)


def _stream(request: _Request) -> PromptData:
    """Train rows that are tokenised as they are read, and a set of the first test rows."""
    config, phase = request.config, request.phase
    trained, tested = [], []
    skipped: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, text in config.sources(phase):
        train, test = stream_source(name, config.read, skipped)
        if test is None:
            raise UserError(
                f"streaming: {name} has no test rows, and none can be held out of a stream; "
                "put a test file beside the train file, or drop streaming"
            )
        trained.append((train, parse_proportions(text)))
        tested.append(test)

    def read() -> Iterator[Example]:
        parts = [rows_of_phase(train(), request.seed, share, phase) for train, share in trained]
        return complete(in_turns(parts), NEEDED_COLUMNS[phase], phase)

    convert = request.converter()
    limit = config.max_eval_samples or _STREAMED_EVAL_ROWS
    parts = in_turns([test() for test in tested])
    rows = list(complete(islice(parts, limit), NEEDED_COLUMNS[phase], phase))
    if not rows:
        raise UserError("streaming: the test files hold no rows; give at least one")
    evaluation = datasets.Dataset.from_dict(convert(rows, counts), FEATURES[phase])
    names = ", ".join(name for name, _ in config.sources(phase))
    report = SourceReport.of(names, "eval", len(rows), len(evaluation), dict(skipped), counts)
    if not len(evaluation):
        raise UserError(nothing_left([report], "eval", config.data_split, phase))
    stream = RowStream(read, convert, skipped)
    return PromptData(
        stream, evaluation, DataReport(phase, (report,), None, len(evaluation)), "streamed"
    )


def _read(folder: Path, split: str, maximum: int | None, seed: int) -> datasets.Dataset:
    """Map the rows of a split into memory, at most `maximum`: each source keeps its share."""
    files = sorted(folder.glob(f"{split}-*.arrow"))
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])
    if maximum is None or maximum >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:maximum]))


def _prepare(request: _Request) -> str:
    """Find the folder of the tokenised set, written first if it is not there yet."""
    config, phase = request.config, request.phase
    root = Path(config.data_output_path).expanduser()
    sources = [
        (load_source(name, request.seed, root / "sources", config.read), proportions)
        for name, proportions in config.sources(phase)
    ]
    contents = [[source.name, source.fingerprint, split] for source, split in sources]
    lengths = [request.max_seq_len, request.max_prompt_len]
    recipe = [RECIPE_VERSION, phase, request.seed, lengths, contents, config.train_on]
    key = digest(tokenizer_fingerprint(request.tokenizer), json.dumps(recipe))
    return str(written_once(root, key, partial(_write, request, sources)))


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


def _write(request: _Request, sources: list[tuple[Source, str]], folder: Path) -> None:
    """Tokenise into the new `folder`: train-*.arrow, eval-*.arrow and report.json."""
    config, phase = request.config, request.phase
    for source, _ in sources:
        _require_columns(source, phase)
    folder.mkdir()
    reports: list[SourceReport] = []
    for split in ("train", "eval"):
        for number, (source, text) in enumerate(sources):
            rows = source.test
            if split == "train":
                share = parse_proportions(text)
                chosen = phase_split(len(source.train), request.seed, share, phase)
                rows = source.train.select(np.sort(chosen))  # read from front to back
            used, counts = 0, Counter[str]()
            if len(rows):
                part = folder / f"{split}-{number:03d}.arrow"
                workers = choose_workers(config.preprocessing_num_workers, len(rows))
                used, counts = tokenise(rows, request.converter(), part, workers)
            skipped = source.skipped.get("train" if split == "train" else "test", {})
            report = SourceReport.of(source.name, split, len(rows), used, skipped, counts)
            reports.append(report)
        if not any(report.used for report in reports if report.split == split):
            raise UserError(nothing_left(reports, split, config.data_split, phase))
    (folder / "report.json").write_text(
        json.dumps([asdict(report) for report in reports], indent=1), encoding="utf-8"
    )


def choose_workers(workers: int | None, rows: int) -> int:
    """Choose how many processes tokenise so many rows; `workers` is the user's number."""
    if workers is not None:
        return min(workers, rows)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, rows // _ROWS_PER_WORKER))
