"""Plain text as blocks of tokens, all of one length, for language modelling; kept as Arrow.

Texts follow one another, each with the tokenizer's own beginning and an end token, and are divided
into blocks without padding; the rest at the end makes no block. Nothing keeps the texts of
one block apart, as in pretraining. Names of special tokens in a text are ordinary text, and an end
token at its end is the one that is put there.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dschat.data.cache import open_folder, written_once
from dschat.data.names import SUFFIXES
from dschat.data.report import named_note
from dschat.data.sources import TEXT_COLUMN, Finder, Rows, digest
from dschat.errors import UserError
from dschat.text.conversations import kind_of
from dschat.text.encoding import encode, tokenizer_fingerprint
from dschat.text.ordinary import ordinary_texts

# Part of every stored set's key: raise it when the same texts are to become other blocks.
VERSION = 2
SETTING = "unsupervised_dataset_name"
KINDS = (".txt", *SUFFIXES)
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32()))])
_TEXTS_AT_A_TIME = 256


@dataclass(frozen=True)
class TextBlocks:
    """Rows of `input_ids`, each of `length` tokens.

    Attributes:
        key: digest of texts, tokenizer and length.
        special_names: texts that name special tokens, which are ordinary text there.
    """

    blocks: datasets.Dataset
    length: int
    key: str
    special_names: int = 0

    def lines(self) -> list[str]:
        """Describe how the texts are read, where it may be otherwise than meant."""
        return [f"{SETTING}: {note}" for note in named_note(self.special_names)]


def create_text_blocks(
    name: str,
    config: str | None,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    cache: str | None,
    once: Callable[[Callable[[], str]], str] | None = None,
    keep_special_tokens: bool = False,
) -> TextBlocks:
    """Tokenise a source into blocks, once by one process.

    Args:
        name: a .txt file (one text), a .jsonl, .json or .parquet file with a column `text`, a
            folder of files of one such kind, one written by `datasets`, or a hub id.
        config: the configuration of a hub id. cache: `data_output_path`.
        once: as in `create_prompt_dataset`.
        keep_special_tokens: names of special tokens in the texts are the tokens.

    Raises:
        UserError: nothing there, a row without text, or less text than one block.
    """

    def prepare() -> str:
        rows, _ = Finder(SETTING, KINDS, config, any_file=True).find(name)
        recipe = f"{length} {keep_special_tokens} {VERSION}"
        key = digest(tokenizer_fingerprint(tokenizer), rows.digest(), recipe)
        write = partial(_write, rows, tokenizer, length, keep_special_tokens)
        return str(written_once(open_folder(cache), "blocks", key, write))

    folder = Path(prepare() if once is None else once(prepare))
    blocks = datasets.Dataset.from_file(str(folder / "blocks.arrow"))
    counts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return TextBlocks(blocks, length, folder.name, **counts)


def _texts(rows: Rows) -> Iterator[str]:
    """Yield every text that is more than white space."""
    for place, row in rows.read():
        text = row.get(TEXT_COLUMN) if isinstance(row, Mapping) else None
        if not isinstance(text, str):
            columns = ", ".join(row) if isinstance(row, Mapping) else kind_of(row)
            raise UserError(
                f"{SETTING}: {place}: no text in a column {TEXT_COLUMN!r} (found: {columns}); "
                "rename the column, or fix the row"
            )
        if text.strip():
            yield text


def _write(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, length: int, keeps: bool, folder: Path
) -> None:
    """Write into `folder`: blocks.arrow and report.json."""
    texts, count, named = _texts(rows), 0, 0
    waiting: list[int] = []
    path = str(folder / "blocks.arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        while batch := list(islice(texts, _TEXTS_AT_A_TIME)):
            if not keeps:
                batch, found = ordinary_texts(tokenizer, batch)
                named += found
            for ids in encode(tokenizer, batch):
                # Some tokenizers put an end token there themselves.
                has_end = ids[-1:] == [tokenizer.eos_token_id]
                waiting += ids if has_end else [*ids, tokenizer.eos_token_id]
            full = len(waiting) // length
            if full:
                blocks = [waiting[i * length : (i + 1) * length] for i in range(full)]
                writer.write_batch(pa.record_batch([pa.array(blocks, SCHEMA[0].type)], SCHEMA))
                waiting, count = waiting[full * length :], count + full
    if not count:
        raise UserError(
            f"{SETTING} {rows.label}: {len(waiting)} tokens, less than one block of {length} "
            "(--max_prompt_seq_len + --max_answer_seq_len); give more text"
        )
    (folder / "report.json").write_text(json.dumps({"special_names": named}), encoding="utf-8")
