"""Write the reference: a page for each command, made from the parser behind its `--help`.

    python -m docs.site.reference FOLDER

Of a flag that is a setting the page has type, default, bounds and help; of the few others what the
parser knows. No program gets further than its help: torch is not imported.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from unittest import mock

from dschat.command.door import run
from dschat.command.registry import COMMANDS, Command, by_group
from dschat.config.help import OneLineParser
from dschat.settings import Flag

TYPES = {int: "whole number", float: "number", str: "text"}


def parser_of(command: Command) -> OneLineParser:
    """Start a command for its help, and catch the parser that would print it."""
    caught: list[OneLineParser] = []

    def catch(parser: OneLineParser, file: object = None) -> None:
        caught.append(parser)

    main = sys.modules["__main__"]
    with (
        mock.patch.object(OneLineParser, "print_help", catch),
        mock.patch.object(sys, "argv", sys.argv),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        run(command, ["--help"])
    sys.modules["__main__"] = main  # a program that is a file takes its place
    (parser,) = caught
    return parser


def kind_of(flag: Flag) -> str:
    """A setting's type in words: `whole numbers, each in [0, 4]`."""
    element, rule = flag.kind.element, flag.rule
    if element is bool:
        return "switch"
    if rule.choices is not None:
        listed = ", ".join(f"`{choice}`" for choice in rule.choices)
        return f"{'some' if flag.kind.is_tuple else 'one'} of {listed}"
    said = TYPES[element]
    bounds = (rule.at_least, rule.above, rule.at_most, rule.below)
    if any(bound is not None for bound in bounds):
        said = rule.wanted(element).removeprefix("a ")
        if not said.startswith(TYPES[element]):
            said = f"{TYPES[element]}, {said}"
    return f"list: {said}" if flag.kind.is_tuple else said


def default_of(flag: Flag) -> str | None:
    """A setting's default in words; None where its help tells it, or there is none to tell."""
    if flag.default is MISSING:
        return "**required**"
    if flag.default in (None, ()) or flag.kind.element is bool:
        return "on unless given" if flag.default is True else None
    shown = " ".join(map(str, flag.default)) if flag.kind.is_tuple else flag.default
    return f"default `{shown}`"


def escaped(text: str) -> str:
    """Text as Markdown: nothing in it is markup, but for code between backquotes."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a quote without its fellow
        parts = [text.replace("`", "\\`")]
    parts[::2] = [re.sub(r"([\\*_{}\[\]<>#|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def setting_entry(flag: Flag) -> Iterator[str]:
    """Yield the paragraphs on a flag that is a setting."""
    yield f"### `--{flag.name}` {{ #{flag.name} }}"
    facts = [kind_of(flag)]
    if not flag.rule.retired and (default := default_of(flag)):
        facts.append(default)
    if flag.rule.bare is not None:
        facts.append(f"without a value `{flag.rule.bare}`")
    if flag.rule.may_change:
        facts.append("may change when a run resumes")
    yield f"*{' · '.join(facts)}*"
    yield escaped(flag.help)


def other_entry(action: argparse.Action) -> Iterator[str]:
    """Yield the paragraphs on a word or flag that is no setting."""
    yield f"### `{action.option_strings[-1] if action.option_strings else action.dest}`"
    if action.choices is not None:
        yield f"*one of {', '.join(f'`{choice}`' for choice in action.choices)}*"
    yield escaped(action.help or "")


def description(text: str) -> Iterator[str]:
    """Yield a program's description by paragraphs: its indented lines are code already."""
    for part in text.strip().split("\n\n"):
        yield part if part.startswith(" ") else escaped(part)


def page(command: Command) -> str:
    """The page of one command."""
    parser = parser_of(command)
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    parts = [f"# dschat {command.name}", f"```text\n{usage}\n```"]
    parts += description(parser.description or "")
    if parser.flags and "[--config FILE]" in usage:
        parts.append(
            "Flags are keys of its `--config` file too, and names [in Python](../python.md)."
        )
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        general = group.title in ("positional arguments", "options")
        title = f"## {'Words and flags' if general else group.title}"
        if actions and title not in parts:
            parts += [title, escaped(group.description or "")]
        for action in actions:
            flag = parser.flags.get(action.dest)
            parts += setting_entry(flag) if flag else other_entry(action)
    return "\n\n".join(filter(None, parts)) + "\n"


def pages() -> dict[str, str]:
    """Every page of the reference: its place on the site and its Markdown."""
    index = ["# Reference\n", "Every command, and each of its flags as the code declares it.\n"]
    for group, commands in by_group():
        index += [f"\n## {group.capitalize()}\n", "| command | what it does |", "| --- | --- |"]
        index += [f"| [dschat {c.name}]({c.name}.md) | {c.purpose} |" for c in commands]
    made = {f"reference/{name}.md": page(command) for name, command in COMMANDS.items()}
    return {"reference/index.md": "\n".join(index) + "\n", **made}


def main() -> None:
    """Write all pages below the folder that the command line names."""
    (folder,) = map(Path, sys.argv[1:])
    for name, text in pages().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
