"""Break training runs in every way listed in cases.py; resume, compare, and keep count.

    make faults                                           the long form, an hour on two cores
    python -m tests.faults --jobs 2 --minutes 30          as much as fits; a later call goes on
    python -m tests.faults --case "sft-z0-r1 kill 7"      one case again
    python -m tests.faults --table                        what is known so far, as in the docs

Results are kept in FOLDER/results.jsonl, a line a case with the commit that it was tried at; a case
that has one is not tried again, with --failed unless it failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from tests.faults import library

FOLDER = "build/faults"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(FOLDER), help="of runs and results")
    parser.add_argument("--case", action="append", help="try this one, whether or not it was tried")
    parser.add_argument("--middle", action="store_true", help="the cases of the slow tests alone")
    parser.add_argument("--failed", action="store_true", help="try what failed again as well")
    parser.add_argument("--only", default="", help="cases whose name this pattern is in")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--minutes", type=float, help="start no case after so many")
    parser.add_argument("--table", action="store_true", help="print the table of results, try none")
    parser.add_argument("--write", type=Path, help="write the counts there, as JSON")
    return parser.parse_args(argv)


def warm_up() -> None:
    """Import and look up once what every run needs, on one thread, without GPU and network."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    import pkgutil
    from importlib import import_module

    import datasets  # noqa: F401
    import deepspeed.ops
    import torch
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import dschat

    for module in pkgutil.walk_packages(dschat.__path__, "dschat."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    torch.set_num_threads(1)
    assert deepspeed.ops.__compatible_ops__  # which are found out by a compiler
    get_checkpoint_conversion_mapping("llama")  # parses the patterns of all families
    names = ("get_scheduler", "AutoModelForCausalLM", "LlamaForCausalLM")
    for name in (*names, "LlamaForSequenceClassification"):
        getattr(transformers, name)


def work(queue: int, names: list[str], folder: Path, done: Callable[[dict], bool]) -> None:
    """Take cases from a pipe of their numbers until it is empty; append each verdict."""
    from tests.faults.bench import Bench
    from tests.faults.cases import Case
    from tests.faults.verdicts import Verdict, expand, try_case

    bench, results = Bench(folder), folder / "results.jsonl"
    while number := os.read(queue, 4):
        for case in expand(Case.named(names[struct.unpack("i", number)[0]]), bench):
            if (verdict := tried(results).get(case.name)) and done(verdict):
                continue
            began = time.perf_counter()
            try:
                verdict = try_case(case, bench)
            except Exception:
                complaint = f"the driver itself: {traceback.format_exc(limit=-3)}"
                verdict = Verdict(case.name, "driver", complaints=[complaint])
            seconds = round(time.perf_counter() - began, 2)
            line = {**vars(verdict), "seconds": seconds, "commit": commit()}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            state = "; ".join(verdict.complaints) or "ok"
            print(f"{case.name}: {verdict.result}, {line['seconds']} s, {state}", flush=True)


@cache
def commit() -> str:
    """Commit of this checkout, in short."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def tried(results: Path) -> dict[str, dict]:
    """Verdicts by case; the last of each counts."""
    if not results.exists():
        return {}
    lines = map(json.loads, results.read_text().splitlines())
    return {line["case"]: line for line in lines}


def run_all(names: list[str], folder: Path, args: argparse.Namespace) -> None:
    """Hand out the cases to processes that are forked from this one."""

    def done(verdict: dict) -> bool:
        return not args.case and not (args.failed and verdict["complaints"])

    reading, writing = os.pipe()
    workers = []
    for _ in range(args.jobs):
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            try:
                work(reading, names, folder, done)
            except KeyboardInterrupt:
                os._exit(130)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        workers.append(pid)
    os.close(reading)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        hand_out(writing, len(names), deadline)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
    finally:
        os.close(writing)
        for pid in workers:
            os.waitpid(pid, 0)


def hand_out(pipe: int, count: int, deadline: float) -> None:
    """Write the numbers one ahead of the workers, until the deadline."""
    import fcntl
    import termios

    for number in range(count):
        while struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0\0\0\0"))[0]:
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        if time.monotonic() > deadline:
            return
        try:
            os.write(pipe, struct.pack("i", number))
        except BrokenPipeError:
            return


def main() -> None:
    """Try the cases that are asked for and not yet tried."""
    args = parse()
    folder = args.folder.resolve()
    if not args.table:
        if library.compiler() is None:
            sys.exit("no C compiler (cc, gcc or clang): the library that breaks runs needs one")
        library.restart_with_library()
        warm_up()
        from tests.faults.cases import long_form, middle_form

        folder.mkdir(parents=True, exist_ok=True)
        cases = args.case or [c.name for c in (middle_form if args.middle else long_form)()]
        names = [name for name in cases if re.search(args.only, name)]
        run_all(names, folder, args)
    from tests.faults.report import counts, table

    verdicts = list(tried(folder / "results.jsonl").values())
    found = counts(verdicts)
    print(table(found))
    if args.write:
        args.write.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(any(verdict["complaints"] for verdict in verdicts))


if __name__ == "__main__":
    main()
