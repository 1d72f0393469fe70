"""Look at a checkpoint, verify it, and make it fit another machine.

    python -m dschat.checkpoint inspect output/checkpoints/step-000200
    python -m dschat.checkpoint verify  output/checkpoints/step-000200
    python -m dschat.checkpoint convert output/checkpoints/step-000200

`inspect` prints what it is of. `verify` compares every byte with its SHA-256, and ends with code 1
and the file's name where one differs. `convert` writes one that any number of processes and any
ZeRO stage resumes, by default beside it: step-000200-portable.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dschat.config.cli import run_cli
from dschat.config.help import OneLineParser, program
from dschat.errors import UserError
from dschat.train import checkpoint_folder
from dschat.utils.files import in_words
from dschat.utils.printable import printable


def describe(folder: Path) -> Iterator[str]:
    """Yield lines on a checkpoint: its run, its place in it, shape, settings and sizes.

    Raises:
        UserError: it is no checkpoint, or its record is damaged.
    """
    record = checkpoint_folder.read_record(folder)
    settings = record["settings"]
    yield f"{folder}: {record['kind']}, step {record['step']} of {settings['total_steps']}"
    yield f"epoch {record['epoch'] + 1}, {record['batch']} batches of it used up"
    stages = {n: v for n, v in settings.items() if n.endswith("zero_stage")}
    shape = "portable, saved by" if record.get("portable") else "saved by"
    yield f"{shape} {record['processes']} processes, " + ", ".join(
        f"{name} {value}" for name, value in stages.items()
    )
    for name, engine in record["engines"].items():
        rates = ", ".join(f"{group} {rate:g}" for group, rate in engine["peak_rates"].items())
        yield f"{name}: peak rates {rates}"
    yield "settings: " + ", ".join(f"{n} {v}" for n, v in sorted(settings.items()) if v is not None)
    sizes = {name: (folder / name).stat().st_size for name in record["files"]}
    yield from (f"{in_words(size):>10}  {name}" for name, size in sizes.items())
    yield f"{in_words(sum(sizes.values())):>10}  in {len(sizes)} files"


def verify(folder: Path) -> int:
    """Compare every file with its digest; return how many there are.

    Raises:
        UserError: naming the first that differs.
    """
    record = checkpoint_folder.read_record(folder)
    checkpoint_folder.check_files(folder, record["files"])
    return len(record["files"])


def convert(folder: Path, target: Path) -> None:
    """Write the portable form of a checkpoint, which is verified first.

    Raises:
        UserError: it is damaged, cannot be converted, or `target` is there.
    """
    from dschat.train.portable import write_portable

    verify(folder)
    write_portable(folder, checkpoint_folder.read_record(folder), target)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, and do what it says."""
    parser = OneLineParser(__doc__, prog=program("dschat.checkpoint"))
    parser.add_argument("command", choices=("inspect", "verify", "convert"))
    parser.add_argument("folder", type=Path, help="a step-... folder")
    parser.add_argument("target", type=Path, nargs="?", help="folder to write (convert)")
    args = parser.parse_args(argv)
    if args.target is not None and args.command != "convert":
        raise UserError(f"target {args.target}: {args.command} writes no checkpoint; drop it")
    checkpoint_folder.read_record(args.folder)
    if args.command == "inspect":
        print("\n".join(map(printable, describe(args.folder))))
    try:
        files = verify(args.folder)
    except UserError as error:
        print(printable(f"error: {error}", keep=""), file=sys.stderr)
        sys.exit(1)
    if args.command != "convert":
        print(printable(f"{args.folder}: {files} files, every byte as it was saved"))
        return
    target = args.target or args.folder.with_name(f"{args.folder.name}-portable")
    convert(args.folder, target)
    print(printable(f"{args.folder} converted: --resume {target}"))


if __name__ == "__main__":
    run_cli(main)
