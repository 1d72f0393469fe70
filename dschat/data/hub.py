"""Sets of the Hub, and folders that `datasets` has saved."""

from pathlib import Path

import datasets
import pyarrow as pa

from dschat.errors import UserError, brief

# Sets that the Hub keeps under another name, or whose configuration must be named.
ON_THE_HUB = {
    "mkqa-Chinese": ("apple/mkqa",),
    "mkqa-Japanese": ("apple/mkqa",),
    "Hello-SimpleAI/HC3-Chinese": ("Hello-SimpleAI/HC3-Chinese", "all"),
}

# Names of readers in `datasets`, which would read whatever lies in the current folder.
PACKAGED = frozenset(datasets.packaged_modules._PACKAGED_DATASETS_MODULES)

# Raised for damaged folders; of what a damaged description of the columns says, anything may fail.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException)


def is_saved(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def open_saved(path: Path, setting: str) -> datasets.DatasetDict:
    """Open a folder written by `save_to_disk`; a lone set is its train split.

    Raises:
        UserError: the folder is not complete; `setting` is what names it.
    """
    try:
        loaded = datasets.load_from_disk(str(path))
        for part in loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]:
            # Mapped into memory as it is: damaged offsets would end the process, not raise.
            part.data.validate(full=True)
    except _DAMAGE as error:
        raise UserError(
            f"{setting} {path}: not a complete `datasets` folder "
            f"({type(error).__name__}); save it again"
        ) from error
    is_lone = isinstance(loaded, datasets.Dataset)
    return datasets.DatasetDict(train=loaded) if is_lone else loaded


def fetch(
    name: str, setting: str, config: str | None = None, streaming: bool = False
) -> datasets.DatasetDict:
    """Fetch a set from the Hub; streaming, its rows come as they are read.

    Raises:
        UserError: the Hub does not give it; `setting` is what names it.
    """
    if name in PACKAGED:
        raise UserError(f"{setting} {name}: names no set; give a file, a folder or a hub id")
    options = {"streaming": True} if streaming else {}
    arguments = (name, config) if config else ON_THE_HUB.get(name, (name,))
    try:
        return datasets.load_dataset(*arguments, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{setting} {name}: not a file or folder here, and the Hub did not give it "
            f"({brief(error)}); check the name and the connection, or download it and give "
            "its folder"
        ) from error
