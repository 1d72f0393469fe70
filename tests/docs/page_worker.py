"""Runs programs in turn, each in a fork of this process, which has imported everything already.

Started with a JSON file that holds a list of runs: the words of a command line, the folder, text
for standard input, a file for all output. Their exit codes go into `codes.json` beside the list.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch  # noqa: F401
import transformers

from dschat.command import door

# Imported or looked up here once, not in every run.
HEAVY = (transformers.AutoTokenizer, transformers.LlamaForCausalLM, transformers.PreTrainedModel)


def start(words: list[str]) -> None:
    """Be the program of a command line: `dschat ...`, `python -m MODULE ...`, `python FILE ...`."""
    if words[0] == "dschat":
        sys.argv = words
        door.main()
    elif words[1] == "-m":
        sys.argv = words[2:]
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words[1:]
        runpy.run_path(words[1], run_name="__main__")


def child(words: list[str], folder: str, given: str, log: str) -> None:
    """Be one run; never returns."""
    os.chdir(folder)
    read, write = os.pipe()
    os.write(write, given.encode())
    os.close(write)
    os.dup2(read, 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 0
    try:
        start(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # what the interpreter would do with it
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Run them all, whatever comes of each."""
    plan = Path(sys.argv[1])
    codes, runs = [], json.loads(plan.read_text())
    if any(words[1] in ("sft", "reward", "ppo") for words, *_ in runs):
        import deepspeed  # noqa: F401  (takes seconds)
    for run in runs:
        if (pid := os.fork()) == 0:
            child(*run)
        _, status, used = os.wait4(pid, 0)
        codes.append(os.waitstatus_to_exitcode(status))
        print(
            f"{used.ru_utime + used.ru_stime:.1f} s, code {codes[-1]}: {' '.join(run[0])}",
            flush=True,
        )
    plan.with_name("codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
