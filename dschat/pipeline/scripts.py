"""Shell scripts of the steps: the one that serves a model, and the words it hands to main.py."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from dschat.errors import UserError

FALLBACK_SIZE = {1: "1.3b", 2: "350m", 3: "1.3b"}  # whose script serves any other model
# Hidden sizes of the models that a script's learning rates are meant for, by their sizes.
WIDTHS = {"350m": 1024, "1.3b": 2048, "6.7b": 4096, "13b": 5120, "30b": 7168, "66b": 9216}
CRITIC_WIDTH = 1024
# What a script calls, in `arguments_of`: nothing is made, printed or started.
STAND_INS = {"mkdir": ":"} | dict.fromkeys(
    ("deepspeed", "python"), 'printf "%s\\0" "$@" > "$WORDS"'
)


def size_of(model: str) -> str | None:
    """1.3b for facebook/opt-1.3b or 1.3b; None for any other id or folder."""
    short = model.removeprefix("facebook/opt-")
    known = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
    return short if short in known else None


def script_for(scripts: Path, step: int, model: str, deployment: str) -> tuple[Path, list[str]]:
    """Find the step's script for a model, and the flags that put the model into it.

    Args:
        scripts: folder of the step's scripts.

    Raises:
        UserError: there is none of this deployment.
    """
    folder = scripts / "opt" / deployment
    size = size_of(model)
    for name in (f"run_{size}.sh", f"run_{size}_lora.sh"):
        if size is not None and (script := folder / name).is_file():
            return script, []
    script = folder / f"run_{FALLBACK_SIZE[step]}.sh"
    if not script.is_file():
        raise UserError(
            f"--deployment-type {deployment}: step {step} has no script for {model} there "
            f"(training_scripts/opt/{deployment}); choose single_gpu or single_node, or give "
            "`dschat run` a file with hardware multi_node, which starts any model"
        )
    name = model if size is None else f"facebook/opt-{size}"
    return script, [] if step == 3 else ["--model_name_or_path", name]


def size_in(script: Path) -> str:
    """1.3b for run_1.3b.sh and run_1.3b_lora.sh."""
    return script.stem.removeprefix("run_").removesuffix("_lora")


def widths_of(step: int, command: list[str]) -> dict[str, int]:
    """Hidden sizes that the rates in a step's script are meant for; none of the quickstart's."""
    width = WIDTHS.get(size_in(Path(command[1])))
    if width is None:
        return {}
    return {"actor_": width, "critic_": CRITIC_WIDTH} if step == 3 else {"": width}


def arguments_of(command: list[str]) -> list[str]:
    """Words that a script hands to main.py; it runs with launchers that only write them down."""
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder, "words")
        for name, body in STAND_INS.items():
            program = Path(folder, name)
            program.write_text(f"#!/bin/sh\n{body}\n")
            program.chmod(0o755)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "WORDS": str(words), "LAUNCHER": "python"}
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        arguments = words.read_text(encoding="utf-8").split("\0")[:-1]
    start = next(i for i, word in enumerate(arguments) if word.endswith("main.py"))
    return arguments[start + 1 :]
