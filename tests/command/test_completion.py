"""Completion: the words of a help text, and what bash makes of the script."""

import subprocess

from dschat.command.completion import bash, fish, words_of, zsh
from dschat.config.help import OneLineParser
from tests.helpers.launch import TIME_LIMIT

HELP = """usage: dschat merge [-h]

options:
  -h, --help          show this help
  --dtype {fp32,bf16} of the merged weights; --resume is another
  --resume [TEXT]     go on
  --shape TEXT        of the schedule; one of linear, cosine (default: cosine)
"""
COMMANDS = {
    "merge": (
        {
            "--help": (),
            "--dtype": ("fp32", "bf16"),
            "--resume": (),
            "--shape": ("linear", "cosine"),
        },
        (),
    ),
    "checkpoint": ({"--help": ()}, ("inspect", "verify")),
}


def test_flags_and_choices_are_those_of_the_help():
    assert words_of(HELP) == COMMANDS["merge"]
    parser = OneLineParser("What it does.")
    parser.add_argument("command", choices=("inspect", "verify"))
    assert words_of(parser.format_help()) == COMMANDS["checkpoint"]


def complete(*words: str) -> list[str]:
    """What bash offers for the last of these words."""
    script = "\n".join(bash(COMMANDS))
    ask = f"COMP_CWORD={len(words) - 1}; _dschat; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    quoted = " ".join(f"'{word}'" for word in words)
    done = subprocess.run(
        ["bash", "-c", f"{script}\nCOMP_WORDS=({quoted}); {ask}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=TIME_LIMIT,
    )
    return done.stdout.split()


def test_bash_completes_commands_flags_and_choices():
    assert complete("dschat", "") == ["merge", "checkpoint", "--help", "--version"]
    assert complete("dschat", "me") == ["merge"]
    assert complete("dschat", "merge", "--d") == ["--dtype"]
    assert complete("dschat", "merge", "--dtype", "") == ["fp32", "bf16"]
    assert complete("dschat", "merge", "x", "") == []  # a file's name
    assert complete("dschat", "checkpoint", "v") == ["verify"]


def test_zsh_reads_the_script_of_bash_and_fish_has_its_own():
    assert [*zsh(COMMANDS)][1:] == [*bash(COMMANDS)]
    lines = "\n".join(fish(COMMANDS))
    assert "-n '__fish_seen_subcommand_from merge' -l dtype -x -a 'fp32 bf16'" in lines
    assert "-n '__fish_seen_subcommand_from checkpoint' -f -a 'inspect verify'" in lines
