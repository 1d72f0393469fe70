"""Parsers of the programs: errors of one line, and help in groups that fits the window."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from dschat.errors import UserError
from dschat.settings import Flag, Settings, flags_of

LETTERS = {int: "N", float: "X", str: "TEXT"}
WIDEST_CHOICES = 40  # columns; more of them stand in the text
RETIRED = "accepted without effect"
_NEGATIVE = re.compile(r"-((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf|nan)$", re.IGNORECASE)
_OWN_LINE = re.compile(r"\s|\d+\. |- ")  # an example, or an entry of a list


class Help(argparse.HelpFormatter):
    """Help whose paragraphs are wrapped to the window; indented lines and lists keep theirs."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.strip().split("\n\n"):
            lines = paragraph.splitlines()
            if not any(_OWN_LINE.match(line) for line in lines):
                lines = [" ".join(lines)]
            paragraphs.append("\n".join(self._wrapped(line, width, indent) for line in lines))
        return "\n\n".join(paragraphs)

    def _wrapped(self, line: str, width: int, indent: str) -> str:
        if line.startswith(" "):  # a command: it can be copied whole
            return indent + line
        return textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, raised as UserError.

    Attributes:
        flags: those of its flags that are settings, by name.
    """

    def __init__(self, description: str | None = None, **options: Any):
        self.flags: dict[str, Flag] = {}
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=Help, **options
        )
        # argparse of Python 3.11 to 3.13 takes -1e-9 and -inf for flags.
        self._negative_number_matcher = _NEGATIVE

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print together with the usage."""
        raise UserError(message)


def program(module: str) -> str:
    """Name a program in its usage: `dschat NAME` where the command started it."""
    return sys.argv[0] if sys.argv[0].startswith("dschat ") else f"python -m {module}"


def flag_parser(cls: type[Settings], description: str | None) -> OneLineParser:
    """Build the parser of a program's settings, whose help has a group for each settings class."""
    parser = OneLineParser(description, usage=_usage(cls))
    parser.add_argument("--config", metavar="FILE", help="YAML of flag: value; flags win over it")
    groups: dict[tuple[str, ...] | None, argparse._ArgumentGroup] = {}
    flags = flags_of(cls)
    for flag in sorted(flags, key=lambda flag: (flag.rule.retired, len(flag.path) > 1)):
        place = None if flag.rule.retired else flag.path[:-1]
        if place not in groups:
            groups[place] = parser.add_argument_group(*_title(cls, place))
        add_flag(parser, flag, groups[place])
    return parser


def add_flag(
    parser: OneLineParser, flag: Flag, group: argparse._ArgumentGroup | None = None
) -> None:
    """Declare a flag; its default stays out of the namespace, so that only given values are in."""
    parser.flags[flag.name] = flag
    options: dict[str, Any]
    listed = ""
    if flag.kind.element is bool:
        options = {"action": "store_true"}
    else:
        choices = flag.rule.choices
        options = {"type": flag.kind.element, "choices": choices}
        if choices is None or sum(len(str(choice)) + 1 for choice in choices) > WIDEST_CHOICES:
            options["metavar"] = LETTERS[flag.kind.element]
            listed = "" if choices is None else f"; one of {', '.join(map(str, choices))}"
        if flag.kind.is_tuple:
            options["nargs"] = "*" if flag.rule.may_be_empty else "+"
        elif flag.rule.bare is not None:
            options |= {"nargs": "?", "const": flag.rule.bare}
    text = (flag.help + listed).replace("%", "%%")
    if flag.default not in (None, False, (), MISSING) and "default" not in text:
        shown = " ".join(map(str, flag.default)) if flag.kind.is_tuple else flag.default
        text += f" (default: {shown})"
    (group or parser).add_argument(
        f"--{flag.name}", dest=flag.name, default=argparse.SUPPRESS, help=text, **options
    )


def _usage(cls: type[Settings]) -> str:
    name, first = getattr(cls, "WORDS", (None, getattr(cls, "FIRST_WORD", "[--config FILE]")))
    flags = [flag for flag in flags_of(cls) if flag.default is MISSING and flag.name != name]
    needed = [f"--{flag.name} TEXT" for flag in flags]
    words = " ".join(["%(prog)s", *needed, first, "[FLAG ...]"])
    return textwrap.fill(words, 64, subsequent_indent="    ", break_on_hyphens=False)


def _title(cls: type[Settings], place: tuple[str, ...] | None) -> tuple[str, str | None]:
    """Name a group by its place, and describe it as its settings class does."""
    if place is None:
        return RETIRED, None
    owner: type = cls
    for name in place:
        (owner,) = (f.metadata["group"] for f in fields(owner) if f.name == name)
    first = (inspect.getdoc(owner) or "").split("\n\n")[0].replace("\n", " ")
    return " ".join(place) or getattr(cls, "KIND", "settings"), first
