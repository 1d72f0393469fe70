"""Sources, found by name: files, folders and Hub sets; their rows, and the examples of these."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from dschat.data import hub
from dschat.data.files import BROKEN, digest_files, read_rows, short_name
from dschat.data.names import SUFFIXES, is_spelt_as_path
from dschat.data.readers import LOCAL_JSON, Reader, choose_reader
from dschat.data.user_reader import ReadOptions
from dschat.errors import UserError, brief
from dschat.text.conversations import Example, Skip, kind_of

# The first name that is present counts; the later ones are how some sets name their parts.
TRAIN_NAMES = ("train", "train_prefs", "train_sft")
TEST_NAMES = ("test", "eval", "validation", "val", "dev", "test_prefs", "test_sft")


@dataclass(frozen=True)
class Rows:
    """Rows not yet read: their label, how to digest their content and how to read them."""

    label: str
    digest: Callable[[], str]  # reads all of the content
    read: Callable[[], Iterator[tuple[str, Any]]]  # yields (place, row)


Parts = tuple[Rows, Rows | None]  # train rows, and test rows if there are any


@dataclass(frozen=True)
class Finder:
    """Finds train and test rows by the name of a file, a folder or a Hub set.

    Attributes:
        setting: whose value the names are, for messages.
        suffixes: kinds of files that are read.
        config: configuration of a Hub set.
        any_file: without a train file, all files of a folder are train rows; else a lone one is.
        streaming: read Hub sets without downloading them.
    """

    setting: str = "data_path"
    suffixes: tuple[str, ...] = SUFFIXES
    config: str | None = None
    any_file: bool = False
    streaming: bool = False

    def find(self, name: str) -> Parts:
        """Find the rows of a source, not read yet.

        Raises:
            UserError: nothing there, or not of a kind that is read.
        """
        path = Path(name).expanduser()
        if name == LOCAL_JSON:
            return self._local_json()
        is_path = is_spelt_as_path(name, self.suffixes)
        if not path.exists() and not is_path and not (os.sep in name and path.parent.is_dir()):
            loaded = hub.fetch(name, self.setting, self.config, self.streaming)
            return self._splits(name, loaded)
        if self.config is not None:
            raise UserError(
                f"{self.setting} {name}: is a file or folder, which has no configuration "
                f"{self.config}; drop it"
            )
        if path.is_dir():
            return self._folder(path)
        if not path.is_file():
            raise UserError(f"{self.setting} {name}: no such file or folder; check the path")
        return self._files([path]), None

    def _files(self, paths: Sequence[Path]) -> Rows:
        for path in paths:
            if path.suffix not in self.suffixes:
                raise UserError(
                    f"{self.setting} {path}: files of kind {path.suffix!r} are not read; "
                    f"give one of {', '.join(self.suffixes)}"
                )
        label = ", ".join(map(short_name, paths))
        return Rows(label, partial(digest_files, paths), partial(read_rows, paths))

    def _local_json(self) -> Parts:
        """Find data/train.json and data/eval.json, as DeepSpeed-Chat does."""
        roots = (Path.cwd(), Path(__file__).resolve().parents[2])
        for root in roots:
            train, test = root / "data" / "train.json", root / "data" / "eval.json"
            if train.is_file() and test.is_file():
                return self._files([train]), self._files([test])
        places = " and ".join(str(root / "data") for root in dict.fromkeys(roots))
        raise UserError(f"{LOCAL_JSON} needs train.json and eval.json; none in {places}")

    def _folder(self, path: Path) -> Parts:
        if hub.is_saved(path):
            loaded = hub.open_saved(path, self.setting)
            return self._splits(path.name, loaded, path)
        files = sorted(f for f in path.iterdir() if f.suffix in self.suffixes and f.is_file())
        train, test = (self._named(files, names, path) for names in (TRAIN_NAMES, TEST_NAMES))
        if not train and files and (self.any_file or (len(files) == 1 and not test)):
            train = self._of_one_kind(files, path)
        if not train:
            raise UserError(
                f"{self.setting} {path}: no train file in this folder; name one "
                f"train{', train'.join(self.suffixes)} (and test likewise)"
            )
        return self._files(train), self._files(test) if test else None

    def _named(self, files: list[Path], names: tuple[str, ...], folder: Path) -> list[Path]:
        """List the files called `name` or `name-<shard>`, for the first name that has some."""
        for name in names:
            own = [file for file in files if file.stem == name or file.stem.startswith(f"{name}-")]
            if own:
                return self._of_one_kind(own, folder)
        return []

    def _of_one_kind(self, files: list[Path], folder: Path) -> list[Path]:
        if len({file.suffix for file in files}) > 1:
            listed = ", ".join(file.name for file in files[:5])
            raise UserError(f"{self.setting} {folder} holds {listed}: keep files of one kind")
        return files

    def _splits(self, label: str, loaded: datasets.DatasetDict, saved: Path | None = None) -> Parts:
        """Take the train and test split; the digest of a saved one is that of its data files."""

        def rows(split: str) -> Rows:
            def read() -> Iterator[tuple[str, Any]]:
                number = 0
                try:
                    for number, row in enumerate(loaded[split], 1):
                        yield f"{label} {split} row {number}", row
                except BROKEN as error:
                    raise UserError(
                        f"{label} {split}: cannot be read after row {number} ({brief(error)}); "
                        "save or fetch it again"
                    ) from error

            digest_of: Callable[[], str] = partial(getattr, loaded[split], "_fingerprint")
            if saved is not None:
                folder = saved / split if (saved / split).is_dir() else saved
                digest_of = partial(digest_files, sorted(folder.glob("data-*.arrow")))
            return Rows(f"{label} {split}", digest_of, read)

        train, test = (
            next((split for split in names if split in loaded), None)
            for names in (TRAIN_NAMES, TEST_NAMES)
        )
        if train is None:
            raise UserError(
                f"{self.setting} {label}: no split 'train' (splits: {', '.join(loaded)})"
            )
        return rows(train), rows(test) if test else None


def digest(*parts: str) -> str:
    """SHA-256 (hex) of a list of texts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_examples(
    rows: Rows, name: str, options: ReadOptions, skipped: Counter[str]
) -> Iterator[Example]:
    """Yield the checked examples of the source `name`; rows without use are counted in `skipped`.

    Raises:
        UserError: a malformed row, named by file and line.
    """
    read: Reader | None = None
    for place, row in rows.read():
        if not isinstance(row, Mapping):
            raise UserError(f"{place}: is {kind_of(row)}, needs an object with the key 'prompt'")
        try:
            read = read or choose_reader(options, name, row)
            example = replace(read(row), place=place)
            if options.kept:
                example = replace(example, columns=options.kept.of(row))
            _check_text(example)
        except Skip as reason:
            skipped[str(reason)] += 1
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        else:
            yield example


def _check_text(example: Example) -> None:
    """Stop at what is not text, naming the column."""
    prompt = example.prompt
    columns = {"chosen": [example.chosen], "rejected": [example.rejected]}
    columns["prompt"] = [turn.text for turn in prompt] if isinstance(prompt, tuple) else [prompt]
    for column in ("prompt", "chosen", "rejected"):
        for value in columns[column]:
            if value is None and column != "prompt":
                continue
            if not isinstance(value, str):
                raise UserError(
                    f"column {column!r} is {kind_of(value)}, needs text; fix or drop the row"
                )
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"column {column!r} holds half a surrogate pair; fix or drop the row"
                ) from error
