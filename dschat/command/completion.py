"""Print a script that completes `dschat` in a shell.

    dschat completion bash > ~/.local/share/bash-completion/completions/dschat
    dschat completion zsh >> ~/.zshrc
    dschat completion fish > ~/.config/fish/completions/dschat.fish

The script knows commands, flags and their choices as they are now, so that a shell completes
without starting Python; print it again after an update.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

from dschat.command.door import run
from dschat.command.registry import COMMANDS, Command
from dschat.config.cli import run_cli
from dschat.config.help import OneLineParser, program

_FLAG = re.compile(
    r"^  (?:-\w, )?(?P<flag>--[\w-]+)"
    r"(?: \[?\{(?P<set>[^}]+)\}|.*; one of (?P<list>[\w-]+(?:, [\w-]+)*))?",
    re.M,
)
_WORDS = re.compile(r"^  \{([^}]+)\}", re.M)

Flags = dict[str, tuple[str, ...]]  # the choices of each flag
Words = dict[str, tuple[Flags, tuple[str, ...]]]  # of each command, and those of a word alone


def help_of(command: Command) -> str:
    """Return what `dschat COMMAND --help` prints, a line for each flag."""
    out = io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        mock.patch.dict(os.environ, COLUMNS="10000"),
        contextlib.suppress(SystemExit),
    ):
        run(command, ["--help"])
    return out.getvalue()


def words_of(text: str) -> tuple[Flags, tuple[str, ...]]:
    """Read flags with their choices, and the choices of a word without a flag, from a help text."""
    flags = {
        found["flag"]: tuple(re.split(r", ?", choices)) if choices else ()
        for found in _FLAG.finditer(text)
        for choices in [found["set"] or found["list"]]
    }
    word = _WORDS.search(text)
    return flags, tuple(word[1].split(",")) if word else ()


def bash(commands: Words) -> Iterator[str]:
    """Yield the lines of a script for bash."""
    yield "_dschat() {"
    yield '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" known='
    yield '  if [ "$COMP_CWORD" = 1 ]; then'
    yield f'    known="{" ".join(commands)} --help --version"'
    yield '  else case "${COMP_WORDS[1]} $before" in'
    for name, (flags, words) in commands.items():
        for flag, choices in flags.items():
            if choices:
                yield f'    "{name} {flag}") known="{" ".join(choices)}" ;;'
        yield f'    "{name} "*) known="{" ".join([*words, *flags])}"'
        yield '      [[ "$word" == -* || "$COMP_CWORD" = 2 ]] || known= ;;'
    yield "  esac; fi"
    yield '  COMPREPLY=($(compgen -W "$known" -- "$word"))'
    yield "}"
    yield "complete -o default -F _dschat dschat"


def zsh(commands: Words) -> Iterator[str]:
    """Yield the lines of a script for zsh, which reads bash's."""
    yield "autoload -Uz compinit bashcompinit && compinit && bashcompinit"
    yield from bash(commands)


def fish(commands: Words) -> Iterator[str]:
    """Yield the lines of a script for fish."""
    yield "complete -c dschat -n __fish_use_subcommand -l version -d 'print the version'"
    for name, (flags, words) in commands.items():
        purpose = COMMANDS[name].purpose.replace("'", "\\'")
        yield f"complete -c dschat -f -n __fish_use_subcommand -a {name} -d '{purpose}'"
        start = f"complete -c dschat -n '__fish_seen_subcommand_from {name}'"
        if words:
            yield f"{start} -f -a '{' '.join(words)}'"
        for flag, choices in flags.items():
            values = f" -x -a '{' '.join(choices)}'" if choices else ""
            yield f"{start} -l {flag.removeprefix('--')}{values}"


SHELLS: dict[str, Callable[[Words], Iterator[str]]]
SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the script for the shell that is named."""
    parser = OneLineParser(__doc__, prog=program("dschat.command.completion"))
    parser.add_argument("shell", choices=tuple(SHELLS))
    shell = parser.parse_args(argv).shell
    commands = {name: words_of(help_of(command)) for name, command in COMMANDS.items()}
    print("\n".join(SHELLS[shell](commands)))


if __name__ == "__main__":
    run_cli(main)
