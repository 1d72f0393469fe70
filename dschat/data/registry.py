"""Which reader reads a source: by its name, by its columns, or the user's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from dschat.data import named_readers as named
from dschat.data import readers as shapes
from dschat.data.files import digest
from dschat.data.user_functions import READER, TARGETS, load_function, source_digest
from dschat.errors import UserError
from dschat.text.conversations import Example, has_markers, question

Reader = Callable[[Mapping[str, Any]], Example]
LOCAL_JSON = "local/jsonfile"


@dataclass(frozen=True)
class Shape:
    """Rows that have at least these columns, and what reads them.

    `holds` looks at a first row where common words name the columns.
    """

    columns: frozenset[str]
    read: Reader
    holds: Callable[[Mapping[str, Any]], bool] = lambda row: True

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row may be of this shape."""
        return self.columns <= row.keys() and self.holds(row)


def _shape(columns: str, read: Reader, **more: Any) -> Shape:
    return Shape(frozenset(columns.split()), read, **more)


_STANDARD = _shape("prompt", shapes.read_standard)
_MKQA = "queries answers"
_MIRACL = _shape("query positive_passages negative_passages", named.read_miracl)

NAMED = {
    "Dahoas/rm-static": _STANDARD,
    "Dahoas/full-hh-rlhf": _STANDARD,
    "Dahoas/synthetic-instruct-gptj-pairwise": _shape(
        "prompt chosen rejected", named.read_synthetic_instruct
    ),
    "yitingxie/rlhf-reward-datasets": _shape("prompt chosen rejected", named.read_rlhf_reward),
    "openai/webgpt_comparisons": _shape(
        "question answer_0 answer_1 score_0 score_1", named.read_webgpt
    ),
    "stanfordnlp/SHP": _shape("history human_ref_A human_ref_B labels", named.read_shp),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": _shape(
        "prompt label", named.read_vicuna, holds=named.is_vicuna
    ),
    "wangrui6/Zhihu-KOL": _shape("INSTRUCTION RESPONSE", named.read_zhihu),
    "Cohere/miracl-zh-queries-22-12": _MIRACL,
    "Hello-SimpleAI/HC3-Chinese": _shape("question human_answers chatgpt_answers", named.read_hc3),
    "mkqa-Chinese": _shape(_MKQA, named.read_mkqa_chinese),
    "mkqa-Japanese": _shape(_MKQA, named.read_mkqa_japanese),
    "Cohere/miracl-ja-queries-22-12": _MIRACL,
    "lmqg/qg_jaquad": _shape("question sentence paragraph", named.read_jaquad),
    "lmqg/qag_jaquad": _shape("questions paragraph", named.read_jaquad_paragraph),
    LOCAL_JSON: _STANDARD,
}
# Where the Hub keeps a set under another name, or needs its configuration named.
ON_THE_HUB = {
    "mkqa-Chinese": ("apple/mkqa",),
    "mkqa-Japanese": ("apple/mkqa",),
    "Hello-SimpleAI/HC3-Chinese": ("Hello-SimpleAI/HC3-Chinese", "all"),
}

# Known by columns. Of several that fit, one with more of the columns counts; else it is unclear.
SHAPES = (
    _STANDARD,
    *(
        _shape(f"prompt {more}", shapes.read_standard)
        for more in ("chosen", "response", "completion", "chosen rejected", "rejected")
    ),
    _shape("prompt chosen rejected messages", shapes.read_standard),  # UltraFeedback, binarized
    _shape("chosen rejected", shapes.read_pair),
    _shape("messages", shapes.read_chat),
    _shape("prompt messages", shapes.read_chat),  # UltraChat: its prompt is the first message
    _shape("conversations", shapes.read_sharegpt),
    _shape("instruction output", shapes.read_alpaca),
    _shape("instruction completions", shapes.read_completions),
    _shape("prompt completions", shapes.read_completions),
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
    _shape(_MKQA, named.refuse_mkqa),
)


def shape_by_name(name: str) -> Shape | None:
    """The set that a Hub name means, or a path that ends in one or passes through its cache."""
    parts = PurePath(name).parts
    if PurePath(name).suffix in (".json", ".jsonl", ".parquet"):
        parts = parts[:-1]
    for known, shape in NAMED.items():
        ends = {known.rpartition("/")[2], known.replace("/", "___")} - {"jsonfile"}
        cached = f"datasets--{known.replace('/', '--')}"
        if name == known or (parts and (parts[-1] in ends or cached in parts)):
            return shape
    return None


def shape_by_columns(row: Mapping[str, Any]) -> Shape | None:
    """The shape of rows like this one; None where no shape fits.

    Raises:
        UserError: several shapes fit that mean different things.
    """
    fitting = [shape for shape in SHAPES if shape.fits(row)]
    fitting = [s for s in fitting if not any(s.columns < other.columns for other in fitting)]
    if len({shape.read for shape in fitting}) > 1:
        readings = " or ".join(", ".join(sorted(shape.columns)) for shape in fitting)
        raise UserError(
            f"the columns ({', '.join(row)}) can be read in several ways ({readings}); choose "
            "with --dataset_columns prompt=... chosen=... or a --dataset_function"
        )
    return fitting[0] if fitting else None


@dataclass(frozen=True)
class Reading:
    """How the user wants rows read: `target=column` texts, or `module:name` of a function."""

    columns: tuple[str, ...] = ()
    function: str | None = None

    def __post_init__(self) -> None:
        if self.columns and self.function:
            raise UserError("--dataset_columns and --dataset_function contradict: drop one")
        known = [text.partition("=")[0] for text in self.columns]
        for text, target in zip(self.columns, known, strict=True):
            if target not in TARGETS or not text.partition("=")[2] or known.count(target) > 1:
                raise UserError(
                    f"--dataset_columns {text!r}: give prompt=COLUMN, and chosen=COLUMN and "
                    "rejected=COLUMN as far as there are such, each once"
                )
        if self.columns and "prompt" not in known:
            raise UserError("--dataset_columns names no prompt: add prompt=COLUMN")

    def reader(self, name: str, first: Mapping[str, Any]) -> Reader:
        """What reads the rows of the source `name`, of which `first` is one.

        Raises:
            UserError: the columns can be read in several ways.
        """
        if self.function:
            return load_function(self.function)
        if self.columns:
            return self._mapped
        shape = shape_by_name(name)
        if shape is None or not shape.columns <= first.keys():
            shape = shape_by_columns(first) or _STANDARD
        return shape.read

    def key(self, name: str) -> str:
        """What cached rows of the source `name` depend on, beside their bytes."""
        shape = shape_by_name(name)
        parts = [*self.columns, self.function or "", shape.read.__qualname__ if shape else ""]
        if self.function:
            parts.append(source_digest(self.function, READER))
        return digest(*parts)

    def _mapped(self, row: Mapping[str, Any]) -> Example:
        values = {}
        for text in self.columns:
            target, _, path = text.partition("=")
            values[target] = shapes.pick(row, path)
        example = shapes.read_standard(values)
        if isinstance(example.prompt, str) and not has_markers(example.prompt):
            # Only a column that is called prompt is trusted to be in the format already.
            return Example(question(example.prompt), example.chosen, example.rejected)
        return example
