"""Every recipe fits the hardware that its head names, by the plan that its head tells.

And the tables of docs/scaling.md are those of the planner.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dschat.config.cli import parse
from dschat.plan.command import configs_of
from dschat.plan.fake_step import ACTIVATIONS, LOGITS
from dschat.plan.memory import plan_memory
from dschat.plan.recipe import step_of
from dschat.plan.roles import GIB, MemoryPlan
from dschat.plan.speed import Cluster, Part, plan_speed
from dschat.utils.gpus import named_gpu
from tests.config.test_recipes import FOLDER, OWN_MODEL, RECIPES, head

CARDS = {40: "a100-40", 48: "a6000", 80: "a100-80"}  # by the GB of a head
CORE = "qwen3/single_gpu/reward_0.6b.yaml"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == CORE else pytest.mark.slow)
        for name in RECIPES
        if not name.startswith(OWN_MODEL)
    ],
)
def test_a_recipe_fits_its_hardware(name: str):
    said = head(name)
    hardware = re.fullmatch(r"(?:(\d+) nodes of )?(\d+) x (\d+) GB", said["hardware"])
    nodes, gpus, size = (int(number or 1) for number in hardware.groups())
    path = Path(FOLDER) / name
    settings = parse(step_of(path, None), ["--config", str(path)], None)
    configs = configs_of(settings, path, None, None)
    plan = plan_memory(settings, configs, "bf16", nodes * gpus)
    # Written with one decimal, which is off by 0.05 at most.
    assert float(said["needs"].split(" GiB")[0]) == pytest.approx(plan.total / GIB, abs=0.06)
    assert plan.total <= 0.9 * named_gpu(CARDS[size]).memory * GIB


PAGE = Path(FOLDER).parents[1] / "docs/scaling.md"
GPUS = {"A6000": "a6000", "H100": "h100", "A100 40 or 80": "a100-40", "A100 80": "a100-80"}
MORE = {
    "near shards": ["--deepspeed_config", f"{FOLDER}/deepspeed/near_shards_8.json"],
    "gather_for_rollouts": ["--gather_for_rollouts"],
}


def rows_of(heading: str) -> Iterator[tuple[str, MemoryPlan, list[Part], float, list[str]]]:
    """Rows of the page's table below a heading: recipe, memory, parts, GiB of a GPU, figures."""
    _, _, below = PAGE.read_text().partition(f"## {heading}\n")
    lines = [line for line in below.partition("\n## ")[0].splitlines() if line.startswith("|")]
    name = ""
    for line in lines[2:]:
        said, on, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        name = re.search("^`(.*?)`", said)[1] if said.startswith("`") else name
        count, gpu = on.split(" x ")
        words = [word for part, flags in MORE.items() if part in said for word in flags]
        path = Path(FOLDER) / f"{name}.yaml"
        settings = parse(step_of(path, None), ["--config", str(path), *words], None)
        cluster = Cluster(named_gpu(GPUS[gpu]), int(count), max(int(count) // 8, 1))
        configs = configs_of(settings, path, None, None)
        memory = plan_memory(settings, configs, "bf16", cluster.ranks)
        parts = plan_speed(settings, memory, configs, cluster)
        yield name, memory, parts, cluster.gpu.memory, figures


@pytest.mark.slow
def test_the_page_s_memory_is_the_plan_s():
    """Written with one decimal, which is off by 0.05 at most."""
    kinds = ["weights", "adapters", "gradients", "optimizer", ACTIVATIONS, "cache", "buckets"]
    for name, memory, _, of_gpu, cells in rows_of("Memory of the models that matter"):
        *kept, total = cells
        found = [memory.of_kind(kind) / GIB for kind in (*kinds, "margin")]
        found[kinds.index(ACTIVATIONS)] += memory.of_kind(LOGITS) / GIB
        # Written with one decimal, which is off by 0.05; plus float rounding, as of 0.25.
        assert found == pytest.approx([float(cell or 0) for cell in kept], abs=0.051), name
        said = [float(figure) for figure in total.split(" of ")]
        # Likewise: 0.05.
        assert [memory.total / GIB, of_gpu] == pytest.approx(said, abs=0.051), name


@pytest.mark.slow
def test_the_page_s_seconds_are_the_plan_s():
    """Written with one decimal, two below a tenth, none above a hundred."""
    for name, _, every, _, cells in rows_of("From 8 A100 to 64 H100"):
        parts = {part.name: part.seconds - part.sends for part in every}
        rollout, scoring = parts.pop("rollout", 0.0), parts.pop("scoring", 0.0)
        sends, seconds = (sum(getattr(p, kind) for p in every) for kind in ("sends", "seconds"))
        found = [sum(parts.values()), rollout, scoring, sends, seconds]
        for figure, cell in zip(found, cells, strict=False):
            unit = 10 ** -len(cell.partition(".")[2])
            assert figure == pytest.approx(float(cell or 0), abs=0.51 * unit), (name, cells)
