"""One rank that runs several of the shipped programs in turn, as if each were called by itself.

Started alone or by a launcher, with one argument: a JSON file that holds a list of command lines,
the program first, as a path below the repository's root. For each, rank 0 writes what came of it
beside that file, under `results.json`: exit code, standard error, model folders read.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import transformers

from dschat.train import pair_plot
from dschat.utils.launchers import rank_of, torch_variables

ROOT = Path(__file__).resolve().parents[2]


def run(argv: list[str]) -> int:
    """The exit code of one program with this command line, as its own `__main__`.

    A step makes no page of its run and no plot of its pairs, which take a second each; tests/report
    and tests/train make some.
    """
    is_step = argv[0].endswith("/main.py")
    if is_step:
        pair_plot.reliability_png = lambda report: b""
    sys.argv = [str(ROOT / argv[0]), *argv[1:], *(["--no_report"] if is_step else [])]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    except Exception:  # what the interpreter would do with it
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def stderr_into(path: Path) -> Iterator[None]:
    """Send this process's standard error to a file, whoever writes to it."""
    original = os.dup(2)
    with path.open("w") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)


def count_reads() -> list[str]:
    """The model folders whose weights are read from now on; the list grows."""
    read: list[str] = []
    original = transformers.PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, name, *args, **kwargs):
        read.append(str(name))
        return original(cls, name, *args, **kwargs)

    transformers.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    return read


def spare_the_disk() -> None:
    """Let files reach the disk when they may: no test takes the power away."""
    os.fsync = lambda descriptor: None


def main() -> None:
    """Run them all; on several ranks stop at the first that breaks, lest the others wait."""
    spare_the_disk()
    plan, rank = Path(sys.argv[1]), rank_of(os.environ)
    several = int({**os.environ, **torch_variables(os.environ)}.get("WORLD_SIZE", "1")) > 1
    read, results = count_reads(), []
    for number, argv in enumerate(json.loads(plan.read_text())):
        errors = plan.with_name(f"stderr.{number}.{rank}")
        before, start = len(read), time.perf_counter()
        with stderr_into(errors):
            code = run(argv)
        seconds = time.perf_counter() - start
        print(f"-- {argv[0]} ended with {code} after {seconds:.1f} s", flush=True)
        results.append({"code": code, "stderr": errors.read_text(), "read": read[before:]})
        if several and code not in (0, 2):
            sys.exit(errors.read_text()[-4000:])
    if rank == 0:
        plan.with_name("results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
