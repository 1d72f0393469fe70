"""Sources, found by name: files, folders and Hub sets; their rows, each with its place."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from dschat.data import hub
from dschat.data.names import SUFFIXES, is_spelt_as_path
from dschat.data.parquet import BROKEN, read_parquet
from dschat.data.readers import LOCAL_JSON
from dschat.errors import RepeatedKeyError, UserError, brief, unique_keys

TEXT_COLUMN = "text"  # of the one row that a .txt file is
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
        is_path = path.exists() or is_spelt_as_path(name, self.suffixes)
        if not is_path and not (os.sep in name and path.parent.is_dir()):
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
        # With its folder, a name is clear: many sources have a train.jsonl.
        named = {str(Path(*path.parts[-2:])): path for path in paths}
        return Rows(", ".join(named), partial(digest_files, paths), partial(read_rows, named))

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


def digest_files(paths: Sequence[Path]) -> str:
    """SHA-256 (hex) over the bytes of files, so that an edited file is another source."""
    total = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: total)  # which it goes on with
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check it") from error
        total.update(b"\0")
    return total.hexdigest()


def read_rows(files: Mapping[str, Path]) -> Iterator[tuple[str, Any]]:
    """Read the rows of files, each with its place, which begins with the file's name."""
    for name, path in files.items():
        if path.suffix == ".parquet":
            yield from read_parquet(name, path)
        elif path.suffix == ".txt":
            yield name, {TEXT_COLUMN: _parse(path.read_bytes(), name, is_json=False)}
        else:
            with path.open("rb") as file:
                start = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()
                file.seek(0)
                if path.suffix == ".json" and start.startswith(b"["):
                    for number, row in enumerate(_parse(file.read(), name), 1):
                        yield f"{name} row {number}", row
                    continue
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{name} line {number}", _parse(line, name, number)


def _parse(data: bytes, name: str, line: int = 1, *, is_json: bool = True) -> Any:
    """Parse the bytes of JSON or of a text, which begin in a line of the file `name`.

    Raises:
        UserError: with the line of the fault.
    """
    text = ""
    try:
        text = data.decode("utf-8-sig")
        return json.loads(text.rstrip(), object_pairs_hook=unique_keys) if is_json else text
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        problem, remedy = "not UTF-8 text", "save the file as UTF-8"
    except RepeatedKeyError as error:
        problem, remedy = f"{error} in one object", "drop one of them"
        if text.lstrip().startswith("["):
            line += _line_of_fault(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        problem = f"not JSON ({error.msg}, column {error.colno})"
        remedy = "give one object a line, or in .json a list of objects"
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of too many digits
        problem, remedy = f"cannot be read ({brief(error)})", "fix or drop the row"
    raise UserError(f"{name} line {line}: {problem}; {remedy}")


def _line_of_fault(rows: str) -> int:
    """Count the lines before the first row of a list that holds a key twice."""
    decoder, at = json.JSONDecoder(object_pairs_hook=unique_keys), 0
    between = re.compile(r"[\s,\[]*")
    while (match := between.match(rows, at)) is not None:
        try:
            _, at = decoder.raw_decode(rows, match.end())
        except RepeatedKeyError:
            return rows.count("\n", 0, match.end())
    return 0
