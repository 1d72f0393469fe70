"""Every recipe fits the hardware that its head names, by the plan that its head tells."""

import re
from pathlib import Path

import pytest

from dschat.config.cli import parse
from dschat.plan.command import configs_of
from dschat.plan.memory import plan_memory
from dschat.plan.recipe import step_of
from dschat.plan.roles import GIB
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
