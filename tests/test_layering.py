"""Imports point downward only: read from the source, function-level imports included."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up; a file imports from its own line or from those above it here.
LEVELS = [
    "errors",
    "losses rlhf.returns rlhf.experience rlhf.kl_control rlhf.ppo_health utils.data.splits "
    "utils.data.grouping utils.ds_utils utils.flops utils.gpu_peaks utils.perf",
    "utils.zero utils.distributed utils.metrics utils.state_folder",
    "utils.module.lora_layers utils.module.quantized utils.module.lora utils.module.adapter "
    "utils.module.adapter_merge utils.module.adapter_write utils.module.fixed_update utils.optim "
    "utils.advice utils.model.source utils.model.model_utils utils.model.reward_model "
    "utils.model.reward_statistics utils.model.packing utils.save_plan utils.model.words "
    "utils.model.word_cache "
    "utils.model.encoding utils.model.tokenizer utils.data.report utils.data.row_files "
    "utils.data.text_blocks utils.data.cache utils.data.conversations utils.data.row_shapes "
    "utils.data.named_sources utils.data.own_reader utils.data.sources utils.data.row_store "
    "utils.data.raw_datasets utils.data.formats "
    "utils.data.tokenise utils.data.collators utils.data.stream utils.data.loaders "
    "utils.data.data_utils utils.data.survey utils.checkpoint utils.utils cli",
    "utils.engine utils.evaluation utils.startup utils.progress utils.training_plan "
    "utils.restored utils.training_state rlhf.generation rlhf.hybrid rlhf.logprobs rlhf.rollout "
    "rlhf.ema rlhf.ppo_config rlhf.advantages rlhf.ppo_statistics rlhf.retokenise rlhf.one_trunk "
    "rlhf.role_config",
    "rlhf.rlhf_engine rlhf.rewards rlhf.ptx rlhf.answer_table",
    "rlhf.ppo_trainer rlhf.ppo_log",
    "arguments merge quickstart data",
]
LEVEL_OF = {f"dschat.{room}": i for i, rooms in enumerate(LEVELS) for room in rooms.split()}
# What can be read, tested and reused with torch alone.
BARE = [room for room, level in LEVEL_OF.items() if level <= 1]
BARE_PACKAGES = {*sys.stdlib_module_names, "torch", "numpy", "dschat"}
# `model_utils` hands on one stable name from above it, and only when it is asked for.
CYCLES_THROUGH_FUNCTIONS = {("dschat.utils.model.model_utils", "dschat.utils.model.reward_model")}


def name_of(path: Path) -> str:
    """dschat/utils/zero.py → dschat.utils.zero; a package's own file bears the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted((ROOT / "dschat").rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports anywhere; `from package import module` names the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = inside & SOURCES.keys()
            found |= modules if modules == inside else modules | {node.module}
    return found


def level(name: str) -> int | None:
    """A file's level: its own, or that of the room that it is a part of."""
    while name not in LEVEL_OF and "." in name:
        name = name.rpartition(".")[0]
    return LEVEL_OF.get(name)


EDGES = sorted(
    (source, target)
    for source, path in SOURCES.items()
    for target in imports_of(path)
    if target.split(".")[0] == "dschat"
)


def is_empty(path: Path) -> bool:
    """Whether a file holds nothing but a docstring."""
    return all(isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body)


@pytest.mark.parametrize("name", [n for n, path in SOURCES.items() if not is_empty(path)])
def test_every_file_has_a_level(name):
    assert level(name) is not None or name == "dschat", f"{name}: name its level in this test"


def test_the_levels_name_no_file_that_is_gone():
    assert LEVEL_OF.keys() - SOURCES.keys() == set()


def test_the_walk_sees_imports():
    assert ("dschat.arguments.run", "dschat.cli") in EDGES
    assert ("dschat.utils.module.lora", "dschat.utils.zero") in EDGES
    assert ("dschat.utils.model.reward_model", "dschat.utils.zero") in EDGES  # from a package
    assert len(EDGES) > 80


@pytest.mark.parametrize(("source", "target"), EDGES, ids=[f"{s}-{t}" for s, t in EDGES])
def test_imports_point_downward(source, target):
    assert target in SOURCES, f"{source} imports {target}, which is not there"
    if source != "dschat":
        assert level(target) <= level(source), f"{source} is below {target}"


@pytest.mark.parametrize("name", BARE)
def test_the_ground_needs_torch_alone(name):
    packages = {target.split(".")[0] for target in imports_of(SOURCES[name])}
    assert packages <= BARE_PACKAGES


@pytest.mark.parametrize("name", SOURCES)
def test_the_library_does_not_know_its_users(name):
    users = {"training", "inference", "tests", "benchmarks", "e2e_rlhf", "chat"}
    assert {target.split(".")[0] for target in imports_of(SOURCES[name])} & users == set()


def test_no_file_imports_itself_in_a_circle():
    below: dict[str, set[str]] = {name: set() for name in SOURCES}
    for source, target in EDGES:
        if (source, target) not in CYCLES_THROUGH_FUNCTIONS:
            below[source].add(target)
    done: set[str] = set()
    while ready := {name for name in below.keys() - done if below[name] <= done}:
        done |= ready
    assert below.keys() - done == set()
