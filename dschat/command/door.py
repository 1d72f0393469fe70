"""`dschat COMMAND ...`: start the program of a command, as if it were called by itself.

    dschat sft --model_name_or_path facebook/opt-125m --data_path ./pairs.jsonl
    torchrun --nproc_per_node 8 -m dschat sft --config sft.yaml

The program runs in this process, so ranks, signals and exit codes are its own.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Iterator, Sequence

import dschat
from dschat.command.registry import COMMANDS, Command, by_group
from dschat.config.cli import run_cli
from dschat.errors import UserError
from dschat.utils.run_file import run_file


def run(command: Command, words: Sequence[str]) -> None:
    """Run a command's program; it may end the process."""
    sys.argv = [f"dschat {command.name}", *command.words, *words]
    if (file := command.file) is None:
        runpy.run_module(command.program, run_name="__main__")
        return
    run_file(file)


def overview() -> Iterator[str]:
    """Yield the lines of `dschat --help`."""
    yield "usage: dschat COMMAND [...]      dschat COMMAND --help shows its flags"
    for group, commands in by_group():
        yield f"\n{group}:"
        yield from (f"  {command.name:<12}{command.purpose}" for command in commands)
    yield "\nSeveral GPUs: torchrun --nproc_per_node 8 -m dschat COMMAND [...]"
    yield "dschat --version prints the version."


def choose(words: Sequence[str]) -> Command | None:
    """Find the command that the words begin with; None where help or the version was printed.

    Raises:
        UserError: there is none of that name; with the nearest.
    """
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print("\n".join(overview()))
        return None
    if name in ("-V", "--version"):
        print(f"dschat {dschat.__version__}")
        return None
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see dschat --help"
        raise UserError(f"unknown command {name}; {hint}")
    return COMMANDS[name]


def start(words: Sequence[str]) -> None:
    """Do what a command line says."""
    if (command := choose(words)) is not None:
        run(command, words[1:])


def main() -> None:
    """Start the program that the command line names, or say what there is."""
    run_cli(lambda: start(sys.argv[1:]))
