"""Wrong data on the command line: rows of a file each, flags, and what the message must say."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.steps import write_rows

ASK, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
ROW = {"q": {"text": "a"}, "best": "b"}

# name → rows of its file, flags behind --data_path, the message behind the file's name
WRONG_DATA = {
    "no messages": ([{"messages": []}], [], r" line 1: column 'messages' holds no messages"),
    "roles in a wrong order": (
        [{"messages": [ASK, REPLY]}, {"messages": [ASK, ASK]}],
        [],
        r" line 2: column 'messages', message 2: is from user where assistant should speak",
    ),
    "unknown role": (
        [{"messages": [{"role": "tool", "content": "a"}]}],
        [],
        r" line 1: .*message 1: role 'tool' is unknown; use one of system, user, assistant",
    ),
    "content that is no text": (
        [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
        [],
        r" line 1: .*message 1: 'content' is a list, needs text; fix or drop the row",
    ),
    "prompt without answer": (
        [{"messages": [ASK]}] * 3,
        [],
        r" line 1 has no 'chosen' \(3 of 3 rows lack it\), which phase 1 ",
    ),
    "rows of no use": (
        [{"messages": [ASK, REPLY, ASK]}],
        [],
        r": none of its rows is of use \(1 conversation ends without an answer\)",
    ),
    "columns of two kinds": (
        [{"messages": [ASK, REPLY], "instruction": "a", "output": "b"}],
        [],
        r" line 1: the columns \(messages, instruction, output\) can be read in several ways",
    ),
    "mapped column that is not there": (
        [ROW],
        ["--dataset_columns", "prompt=q.txt", "chosen=best"],
        r" line 1: no column 'q\.txt' \(columns: q, best\); name another with --dataset_columns",
    ),
    "function that fails": (
        [ROW],
        ["--dataset_function", "json:loads"],
        r" line 1: dataset_function json:loads fails \(TypeError: .*\); fix it or the row",
    ),
}
WRONG_FLAGS = {
    "mapping without a prompt": (
        ["--dataset_columns", "chosen=best"],
        r"dataset_columns names no prompt: add prompt=COLUMN",
    ),
    "no such module": (
        ["--dataset_function", "no_such_module:f"],
        r"dataset_function no_such_module:f: no_such_module does not import",
    ),
    "unknown prompt format": (
        ["--prompt_format", "alpaca"],
        r"argument --prompt_format: invalid choice: 'alpaca' \(choose from '?dschat'?, '?chat'?, ",
    ),
    "chat format without a template": (
        ["--model_name_or_path", "no-template", "--prompt_format", "chat"],
        r"--prompt_format chat: the tokenizer of '.*no-template' has no chat template; give",
    ),
}


def file_of(name: str) -> str:
    """The file that a case of `WRONG_DATA` reads."""
    return f"wrong-{name.replace(' ', '-')}.jsonl"


def write_wrong_data(folder: Path) -> None:
    """All files of `WRONG_DATA`."""
    for name, (rows, _, _) in WRONG_DATA.items():
        write_rows(folder / file_of(name), rows)
