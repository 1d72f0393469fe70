"""Imports point one way, from room to room, also those inside functions."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up: a room imports from itself and from the rooms before it. Rooms on one line do
# not import each other.
FLOORS = [
    ("errors", "lazy"),
    ("rules",),
    ("settings",),
    ("functional",),
    ("utils",),
    ("text", "models", "report"),
    ("data",),
    ("train",),
    ("rlhf",),
    ("config",),
    ("chat",),
    ("plan", "quickstart", "merge", "checkpoint", "winrate", "push"),
    ("pipeline", "compare"),
    ("command",),
    ("api",),
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Re-exports of names that DeepSpeed-Chat's users import: they may look up, nobody looks at them.
DOORS = {
    "dschat.utils.utils",
    "dschat.utils.data.data_utils",
    "dschat.utils.model.model_utils",
    "dschat.utils.model.reward_model",
}
PROGRAMS = {
    "dschat.data.__main__",
    "dschat.plan.__main__",
    "dschat.report.__main__",
    "dschat.__main__",
}  # above the library, and imported by nobody
BARE_PACKAGES = {*sys.stdlib_module_names, "torch", "numpy", "dschat"}
USERS = {"training", "inference", "tests", "benchmarks", "e2e_rlhf", "chat"}


def name_of(path: Path, root: Path = ROOT) -> str:
    """dschat/utils/zero.py → dschat.utils.zero; a package's own file bears the package's name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted((ROOT / "dschat").rglob("*.py"))}


def room_of(name: str) -> str:
    """dschat.utils.zero → utils."""
    return name.split(".")[1] if "." in name else ""


ROOMS = sorted({room_of(name) for name in SOURCES} - {"", "__main__"})


def imports_of(text: str) -> set[str]:
    """Modules that a source imports anywhere; `from package import module` names the module."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = inside & SOURCES.keys()
            found |= modules if modules == inside else modules | {str(node.module)}
    return found


EDGES = {
    (source, target)
    for source, path in SOURCES.items()
    for target in imports_of(path.read_text(encoding="utf-8"))
    if target.split(".")[0] == "dschat"
}


def wrong_way(edges: set[tuple[str, str]], room: str) -> list[str]:
    """Imports of one room that point to a room that is not below it, or to a door.

    The package itself holds its version alone.
    """
    return [
        f"{source} imports {target}"
        for source, target in sorted(edges)
        if room_of(source) == room
        and source not in DOORS | PROGRAMS
        and (
            target in DOORS
            or (room_of(target) not in ("", room) and FLOOR_OF[room_of(target)] >= FLOOR_OF[room])
        )
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_below_it_alone(room):
    assert wrong_way(EDGES, room) == []


def test_the_rule_sees_an_import_that_points_upward():
    # A LoRA layer that knows the report of the data.
    text = "from dschat.data.report import DataReport\n"
    (target,) = imports_of(text)
    edge = ("dschat.utils.module.quantized", target)
    assert wrong_way(EDGES | {edge}, "utils") == [f"{edge[0]} imports {target}"]
    assert len(EDGES) > 200


def test_every_import_of_the_library_exists():
    assert {target for _, target in EDGES} - SOURCES.keys() == set()
    assert set(ROOMS) == FLOOR_OF.keys()


def test_functional_needs_torch_alone():
    ground = [
        n for n in SOURCES if room_of(n) in ("errors", "lazy", "rules", "settings", "functional")
    ]
    packages = {t.split(".")[0] for n in ground for t in imports_of(SOURCES[n].read_text())}
    assert packages <= BARE_PACKAGES


def imported_at_once(nodes: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that importing a module runs: not those of its functions, nor for type checkers."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from imported_at_once([*node.body, *node.orelse])
        elif isinstance(node, ast.If):
            yield from imported_at_once(node.orelse)
        elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
            yield from imported_at_once(node.body)


def packages_of(name: str) -> dict[str, str]:
    """Packages that importing a module imports, each with the module that does."""
    found, seen, queue = {}, set(), [name]
    while queue:
        module = queue.pop()
        if module in seen:
            continue
        seen.add(module)
        for node in imported_at_once(ast.parse(SOURCES[module].read_text()).body):
            for target in imports_of(ast.unparse(node)):
                if target in SOURCES:
                    parts = target.split(".")
                    queue += [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
                else:
                    found.setdefault(target.split(".")[0], module)
    return found


def test_settings_need_none_of_the_packages_that_take_seconds():
    """Import them in the function that needs them, or from dschat.lazy; see tests/test_start.py."""
    slow = {"torch", "transformers", "datasets", "deepspeed", "numpy", "pyarrow", "huggingface_hub"}
    found = packages_of("dschat.config.cli") | packages_of("dschat.config.programs")
    assert {name: by for name, by in found.items() if name in slow} == {}
    assert "yaml" in found


def test_the_library_does_not_know_its_users():
    for name, path in SOURCES.items():
        assert {t.split(".")[0] for t in imports_of(path.read_text())} & USERS == set(), name


def test_no_file_imports_itself_in_a_circle():
    below: dict[str, set[str]] = {name: set() for name in SOURCES}
    for source, target in EDGES:
        below[source].add(target)
    done: set[str] = set()
    while ready := {name for name in below.keys() - done if below[name] <= done}:
        done |= ready
    assert below.keys() - done == set()


def test_no_room_holds_more_than_a_quarter_of_the_library():
    lines = {name: len(path.read_text().splitlines()) for name, path in SOURCES.items()}
    for room in ROOMS:
        share = sum(n for name, n in lines.items() if room_of(name) == room) / sum(lines.values())
        assert share < 0.25, f"{room}: {share:.0%}"
