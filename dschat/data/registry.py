"""Choose the reader of a source: by its name, by its columns, or the user's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from dschat.data import named_readers as named
from dschat.data import readers
from dschat.data.sources import LOCAL_JSON, digest
from dschat.data.user_reader import READER, TARGETS, user_reader
from dschat.errors import UserError
from dschat.settings import Settings, setting
from dschat.text.conversations import Example, has_markers, question
from dschat.utils.user_functions import source_digest

Reader = Callable[[Mapping[str, Any]], Example]


@dataclass(frozen=True)
class RowFormat:
    """Rows that have at least these columns, and their reader.

    `holds` looks at a first row where common words name the columns; None: they are enough.
    """

    columns: frozenset[str]
    read: Reader
    holds: Callable[[Mapping[str, Any]], bool] | None = None


def _format(columns: str, read: Reader, **more: Any) -> RowFormat:
    return RowFormat(frozenset(columns.split()), read, **more)


_STANDARD = _format("prompt", readers.read_standard)
_MKQA = "queries answers"
_MIRACL = _format("query positive_passages negative_passages", named.read_miracl)

NAMED = {
    "Dahoas/rm-static": _STANDARD,
    "Dahoas/full-hh-rlhf": _STANDARD,
    "Dahoas/synthetic-instruct-gptj-pairwise": _format(
        "prompt chosen rejected", named.read_synthetic_instruct
    ),
    "yitingxie/rlhf-reward-datasets": _format("prompt chosen rejected", named.read_rlhf_reward),
    "openai/webgpt_comparisons": _format(
        "question answer_0 answer_1 score_0 score_1", named.read_webgpt
    ),
    "stanfordnlp/SHP": _format("history human_ref_A human_ref_B labels", named.read_shp),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": _format(
        "prompt label", named.read_vicuna, holds=named.is_vicuna
    ),
    "wangrui6/Zhihu-KOL": _format("INSTRUCTION RESPONSE", named.read_zhihu),
    "Cohere/miracl-zh-queries-22-12": _MIRACL,
    "Hello-SimpleAI/HC3-Chinese": _format("question human_answers chatgpt_answers", named.read_hc3),
    "mkqa-Chinese": _format(_MKQA, named.read_mkqa_chinese),
    "mkqa-Japanese": _format(_MKQA, named.read_mkqa_japanese),
    "Cohere/miracl-ja-queries-22-12": _MIRACL,
    "lmqg/qg_jaquad": _format("question sentence paragraph", named.read_jaquad),
    "lmqg/qag_jaquad": _format("questions paragraph", named.read_jaquad_paragraph),
    LOCAL_JSON: _STANDARD,
}
# Known by columns. Of several that fit, one with more of the columns counts; else it is unclear.
FORMATS = (
    _STANDARD,
    *(
        _format(f"prompt {more}", readers.read_standard)
        for more in ("chosen", "response", "completion", "chosen rejected", "rejected")
    ),
    _format("prompt chosen rejected messages", readers.read_standard),  # UltraFeedback, binarized
    _format("chosen rejected", readers.read_pair),
    _format("messages", readers.read_chat),
    _format("prompt messages", readers.read_chat),  # UltraChat: its prompt is the first message
    _format("conversations", readers.read_sharegpt),
    _format("instruction output", readers.read_alpaca),
    _format("instruction completions", readers.read_completions),
    _format("prompt completions", readers.read_completions),
    *(
        NAMED[name]
        for name in (
            "openai/webgpt_comparisons",
            "stanfordnlp/SHP",
            "pvduy/sharegpt_alpaca_oa_vicuna_format",
            "wangrui6/Zhihu-KOL",
            "Cohere/miracl-zh-queries-22-12",
            "Hello-SimpleAI/HC3-Chinese",
            "lmqg/qg_jaquad",
            "lmqg/qag_jaquad",
        )
    ),
    _format(_MKQA, named.refuse_mkqa),
)


def format_by_name(name: str) -> RowFormat | None:
    """Find the format of a Hub name, or of a path that ends in one or passes through its cache."""
    parts = PurePath(name).parts
    if PurePath(name).suffix in (".json", ".jsonl", ".parquet"):
        parts = parts[:-1]
    for known, row_format in NAMED.items():
        ends = {known.rpartition("/")[2], known.replace("/", "___")} - {"jsonfile"}
        cached = f"datasets--{known.replace('/', '--')}"
        if name == known or (parts and (parts[-1] in ends or cached in parts)):
            return row_format
    return None


def format_by_columns(row: Mapping[str, Any]) -> RowFormat | None:
    """Find the format of rows like this one; None where no format fits.

    Raises:
        UserError: several formats fit that mean different things.
    """
    fitting = [f for f in FORMATS if f.columns <= row.keys() and (not f.holds or f.holds(row))]
    fitting = [s for s in fitting if not any(s.columns < other.columns for other in fitting)]
    if len({row_format.read for row_format in fitting}) > 1:
        readings = " or ".join(", ".join(sorted(row_format.columns)) for row_format in fitting)
        raise UserError(
            f"the columns ({', '.join(row)}) can be read in several ways ({readings}); choose "
            "with --dataset_columns prompt=... chosen=... or a --dataset_function"
        )
    return fitting[0] if fitting else None


@dataclass(frozen=True)
class ReadOptions(Settings):
    """The user's choice of how rows are read, in place of the formats known here."""

    dataset_columns: tuple[str, ...] = setting(
        (),
        "which columns hold what: prompt=question.text chosen=best rejected=worst "
        "(default: recognised)",
    )
    dataset_function: str | None = setting(
        None, "module:name of your function from a row to prompt, chosen, rejected"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_columns and self.dataset_function:
            raise UserError("dataset_columns and dataset_function contradict: drop one")
        targets = [text.partition("=")[0] for text in self.dataset_columns]
        for text, target in zip(self.dataset_columns, targets, strict=True):
            if target not in TARGETS or not text.partition("=")[2] or targets.count(target) > 1:
                raise UserError(
                    f"dataset_columns {text!r}: give prompt=COLUMN, and chosen=COLUMN and "
                    "rejected=COLUMN as far as there are such, each once"
                )
        if self.dataset_columns and "prompt" not in targets:
            raise UserError("dataset_columns names no prompt: add prompt=COLUMN")

    def reader(self, name: str, first: Mapping[str, Any]) -> Reader:
        """Choose the reader of the source `name`, of which `first` is a row.

        Raises:
            UserError: the columns can be read in several ways.
        """
        if self.dataset_function:
            return user_reader(self.dataset_function)
        if self.dataset_columns:
            return self._mapped
        row_format = format_by_name(name)
        if row_format is None or not row_format.columns <= first.keys():
            row_format = format_by_columns(first) or _STANDARD
        return row_format.read

    def key(self, name: str) -> str:
        """Digest what cached rows of the source `name` depend on, beside their bytes."""
        row_format = format_by_name(name)
        reader = row_format.read.__qualname__ if row_format else ""
        parts = [*self.dataset_columns, self.dataset_function or "", reader]
        if self.dataset_function:
            parts.append(source_digest(self.dataset_function, READER))
        return digest(*parts)

    def _mapped(self, row: Mapping[str, Any]) -> Example:
        values = {}
        for text in self.dataset_columns:
            target, _, path = text.partition("=")
            values[target] = readers.pick(row, path)
        example = readers.read_standard(values)
        if isinstance(example.prompt, str) and not has_markers(example.prompt):
            # Only a column that is called prompt is trusted to be in the format already.
            return Example(question(example.prompt), example.chosen, example.rejected)
        return example
