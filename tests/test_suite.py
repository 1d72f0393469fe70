"""The suite's own rules: one thread, time limits, tiers, and what continuous integration runs."""

import ast
import os
import re
from pathlib import Path

import torch

from tests.helpers.tiers import LONGEST, by_tier, position, tiers

ORDER = ast.Lt | ast.LtE | ast.Gt | ast.GtE
TOLERANCES = ("atol", "rtol", "rel", "abs")
ROOT = Path(__file__).resolve().parents[1]


def test_everything_is_computed_on_one_thread_of_the_cpu():
    assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"
    assert not torch.cuda.is_available()


def test_a_time_limit_is_never_a_number_of_its_own():
    """`launch.TIME_LIMIT` alone: what is fitted to one machine fails on a slower one."""
    files = [path for path in ROOT.glob("tests/**/*.py")]
    limits = {path.name: re.findall(r"\btimeout=\d+", path.read_text()) for path in files}
    assert {name: numbers for name, numbers in limits.items() if numbers} == {}


def underived(path: Path) -> list[str]:
    """Places where a number stands for a tolerance without its arithmetic in a comment.

    A tolerance is what `atol`, `rtol`, `rel` or `abs` is given, or a number below 0.02 that another
    is compared with. The comment, with a number, stands above the statement or in it.
    """
    source = path.read_text()
    lines, found = source.splitlines(), []
    for statement in ast.walk(ast.parse(source)):
        if not isinstance(statement, ast.Assert | ast.Assign | ast.Expr | ast.Return):
            continue
        numbers = [n.value for n in ast.walk(statement) if getattr(n, "arg", "") in TOLERANCES]
        for n in ast.walk(statement):
            if isinstance(n, ast.Compare) and isinstance(n.ops[-1], ORDER):
                numbers += [side for side in (n.left, *n.comparators) if 0 < value_of(side) < 0.02]
        first = statement.lineno - 1
        while first and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        derived = re.search(r"#.*\d", "\n".join(lines[first : statement.end_lineno]))
        if not derived and any(value_of(number) for number in numbers):
            found.append(f"{path.relative_to(ROOT)}:{statement.lineno}")
    return found


def value_of(number: ast.expr) -> float:
    """What an expression of literal numbers comes to; 0 for any other."""
    try:
        value = eval(ast.unparse(number), {"__builtins__": {}})
    except (NameError, TypeError):
        return 0.0
    return float(value) if isinstance(value, int | float) else 0.0


def test_a_tolerance_comes_from_its_arithmetic():
    files = sorted(ROOT.glob("tests/**/*.py"))
    assert [place for path in files for place in underived(path)] == []


def test_a_core_never_waits_for_slow_cells():
    starts = []

    def run(names: list[str]) -> dict[str, str]:
        starts.append(names)
        return {name: name.upper() for name in names}

    result = by_tier("abcd", {"a", "c"}, run)
    assert (result("a"), result("c"), starts) == ("A", "C", [["a", "c"]])
    assert (result("d"), result("b"), starts) == ("D", "B", [["a", "c"], ["b", "d"]])
    marked = [getattr(name, "marks", ()) for name in tiers("abcd", {"a", "c"})]
    assert [[mark.name for mark in marks] for marks in marked] == [[], ["slow"], [], ["slow"]]


def test_the_longest_files_come_first(request):
    assert all((ROOT / "tests" / file).is_file() for file in LONGEST)
    files = [item.path.relative_to(ROOT / "tests").as_posix() for item in request.session.items]
    assert [position(file) for file in files] == sorted(map(position, files))
    assert "--no-loadscope-reorder" in (ROOT / "Makefile").read_text()


def test_every_room_has_its_folder_of_tests():
    elsewhere = {"api": "docs", "chat": "inference", "recipes": "config"}
    rooms = {path.name for path in ROOT.glob("dschat/*/")} - {"__pycache__"}
    assert elsewhere.keys() <= rooms
    for room in rooms:
        tests = ROOT / "tests" / elsewhere.get(room, room)
        assert list(tests.glob("test_*.py")), room


def test_continuous_integration_runs_both_tiers_and_exports_nothing():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands[0] == "set -euo pipefail" and commands[1].startswith("cd ")
    assert commands[2:] == ["make test", "make test-slow"]
    makefile = (ROOT / "Makefile").read_text()
    assert '$(PYTEST) -m "not slow"\n' in makefile and "$(PYTEST) -m slow\n" in makefile


def test_the_makefiles_head_names_its_targets():
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"^# make (\S+)  ", makefile, re.M)
    assert {*named} == {*re.search(r"^\.PHONY: (.+)$", makefile, re.M).group(1).split()}
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in named)
