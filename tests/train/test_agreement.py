"""The same weights from every ZeRO stage, number of ranks and way to spread a step.

Starts of `worker.py` on 1 and on 2 ranks train the cells of `cells.all_cells()`, CORE apart from
the rest; here their weights are held to `reference.py`: plain PyTorch on the whole global batch.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dschat.models.save import save_hf_format
from dschat.utils.distributed import Distributed
from tests.helpers import launch
from tests.helpers.launch import run_ranks
from tests.helpers.rounding import (
    IN_A_ROW,
    NEAR_ONE,
    ROUNDING,
    adam_tolerance,
    path_tolerance,
    weight_rtol,
)
from tests.helpers.tiers import by_tier, tiers
from tests.helpers.tiny import byte_tokenizer
from tests.train import cells, reference

WORKER = Path(__file__).with_name("worker.py")
CELLS = {cell.name: cell for cell in cells.all_cells()}
FIRST_STEPS = [name for name, cell in CELLS.items() if cell.first_steps]
BF16 = [name for name, cell in CELLS.items() if cell.dtype == "bf16"]
LIKE_PLAIN = [name for name in CELLS if name not in FIRST_STEPS + BF16]
RANKS = (1, 2)
# Every model, stage and option at least once; the rest of the table is slow.
CORE = {
    "causal-z0-accumulation",
    "causal-z1-offload",
    "causal-z1-offload-first",
    "causal-z2",
    "causal-z2-4bit",
    "causal-z2-bf16",
    "causal-z2-full",
    "causal-z2-json",
    "causal-z3-folder-everything",
    "gpt2-z0",
    "gpt2-z3-tokens",
    "reward-z0",
    "reward-z3-ckpt",
    "reward-z3-first",
}
# "auto" is what the flags say. DeepSpeed makes torch's AdamW of it, not the fused one we would.
USER_JSON = {
    "optimizer": {
        "type": "Adam",
        "params": {"torch_adam": True, "lr": "auto", "betas": "auto", "eps": "auto"},
    }
}


@dataclass(frozen=True)
class Trained:
    """A cell on some number of ranks: its weights, and what happened on the way there."""

    weights: dict[str, torch.Tensor]
    story: dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str, int], Trained]:
    """A cell by its name and the number of ranks."""
    models = tmp_path_factory.mktemp("models")
    alone = Distributed(0, 1, 0, torch.device("cpu"))
    for model in ("causal", "reward", "mixtral"):
        module = cells.build_module(model)
        save_hf_format(module, byte_tokenizer(), models / model, alone)
    (models / "adam.json").write_text(json.dumps(USER_JSON))

    def train(ranks: int, names: list[str]) -> dict[str, Trained]:
        output = tmp_path_factory.mktemp(f"on-{ranks}")
        run_ranks(WORKER, ranks, [str(output), str(models), *names], log_dir=output)
        stories = json.loads((output / "story.json").read_text())
        return {n: Trained(torch.load(output / f"{n}.pt"), stories[n]) for n in names}

    by_ranks = {n: by_tier(CELLS, CORE, functools.partial(train, n)) for n in RANKS}
    return lambda name, ranks: by_ranks[ranks](name)


@functools.cache
def plain(cell: cells.Cell, steps: int):
    return reference.train(cell, steps)


def expected(cell: cells.Cell, steps: int = cells.STEPS):
    """The reference's result: one for all cells that differ in how a step is spread."""
    same = ("model", "full", "everything", "tokens", "quantize", "accumulation", "dtype")
    return plain(cells.Cell("", stage=0, **{key: getattr(cell, key) for key in same}), steps)


def rates_of(key: str, cell: cells.Cell) -> list[float]:
    """The learning rate of a weight in each step, by its name."""
    peaks = {
        "lora_A": cells.BASE_RATE,
        "lora_B": cells.RATIO * cells.BASE_RATE,
        "lora_embedding": cells.EMBEDDING_RATE,
        "lora_token_rows": cells.TOKENS_RATE,
        "v_head": cells.HEAD_RATE,
    }
    peak = next((rate for part, rate in peaks.items() if part in key), cells.BASE_RATE)
    return [peak * reference.factor(step) for step in range(cells.STEPS)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", tiers(LIKE_PLAIN, CORE & {*LIKE_PLAIN}))
def test_weights_are_plain_pytorchs(trained, name: str, ranks: int):
    cell, found = CELLS[name], trained(name, ranks)
    ours, losses, _ = expected(cell)
    start, *_ = expected(cell, 0)
    assert found.weights.keys() == ours.keys()
    for key, tensor in found.weights.items():
        steps = rates_of(key, cell), cells.EPS, cells.CLIP
        rtol, distance = weight_rtol(cells.STEPS), tensor - ours[key]
        allowed = adam_tolerance(*steps) + rtol * ours[key].abs()
        assert (distance.abs() <= allowed).all(), f"{key}: {(distance.abs() / allowed).max()}"
        if torch.equal(ours[key], start[key]):
            assert torch.equal(tensor, start[key]), key
        else:  # the path: entries that are all as far off as one may be would not be rounding
            assert distance.norm() <= path_tolerance(*steps) + rtol * ours[key].norm(), key
    assert found.story["losses"] == pytest.approx(losses, rel=2 * IN_A_ROW)


def test_reference_leaves_room_for_mistakes():
    """Some steps are clipped and some not, the last window is shorter, and what must move moves."""
    cell = CELLS["causal-z0-accumulation"]
    norms = expected(cell)[2]
    assert min(norms) < cells.CLIP < max(norms)
    assert [len(rows) for rows in cells.cell_steps(cell)] == [8, 8, 8, 3]
    for name in ("causal-z0", "reward-z0"):
        after, before = expected(CELLS[name])[0], expected(CELLS[name], 0)[0]
        moved = {key for key in after if not torch.equal(after[key], before[key])}
        adapters = {key for key in after if "lora_" in key}
        assert len(adapters) == 2 * 2 * 7
        assert moved == adapters | ({"v_head.weight"} if name.startswith("reward") else set())


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", tiers(CELLS, CORE))
def test_rates_follow_the_schedule_at_the_ratio(trained, name: str, ranks: int):
    cell, story = CELLS[name], trained(name, ranks).story
    if cell.full:
        peaks = {"decay": 1e-3, "no_decay": 1e-3}
        decays = {"decay": 0.1, "no_decay": 0.0}
    else:
        peaks = {"lora_A": 1e-3, "lora_B": 16e-3}
        if cell.everything:
            peaks["lora_embedding"] = 2e-3
        decays = dict.fromkeys(peaks, 0.0 if cell.first_steps else 0.1)
        if cell.model == "reward":
            peaks["head"], decays["head"] = 4e-3, 0.0 if cell.first_steps else 0.1
        if cell.tokens:
            peaks["token_rows"], decays["token_rows"] = 8e-3, 0.0
        if cell.everything:
            undecayed = {"lora_magnitude": 1e-3, "no_decay": 1e-3}
            peaks |= undecayed
            decays |= dict.fromkeys(undecayed, 0.0)
    factors = [1.0] * 5 if cell.first_steps else [0.0, 0.5, 1.0, 0.75, 0.5]
    assert story["groups"] == decays
    assert len(story["rates"]) == len(factors)
    for rates, factor in zip(story["rates"], factors, strict=True):
        assert rates == pytest.approx({group: factor * peak for group, peak in peaks.items()})


@pytest.mark.parametrize("name", tiers(["causal-z0", "causal-z2", "causal-z3"], ["causal-z2"]))
def test_optimizer_of_the_users_json_is_used(trained, name: str):
    """Its groups, rates and weights are held to the same figures as all others above."""
    assert trained(f"{name}-json", 1).story["fused"] is None
    assert trained(name, 1).story["fused"] is True


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", tiers(FIRST_STEPS, CORE & {*FIRST_STEPS}))
def test_first_steps_are_as_large_as_the_rates(trained, name: str, ranks: int):
    """Adam's first step is the rate itself, B moves by it; A has a gradient only from step 2 on.

    A's moments then are m = 0.1 g / (1 - 0.9^2), v = 0.05 g^2 / (1 - 0.95^2). Weights of A, below
    1 / sqrt(32), are rounded when stored.
    """
    step = 1e-3 * 0.1 / (1 - 0.9**2) / math.sqrt(0.05 / (1 - 0.95**2))
    first, second, *_ = trained(name, ranks).story["moves"]
    assert first["lora_B"] == pytest.approx([16e-3, 16e-3], rel=NEAR_ONE)
    assert first["lora_A"] == [0.0, 0.0]
    assert second["lora_A"] == pytest.approx([step, step], abs=ROUNDING / math.sqrt(32))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", tiers(BF16, CORE & {*BF16}))
def test_bf16_takes_the_same_path_within_its_rounding(trained, name: str, ranks: int):
    cell, weights = CELLS[name], trained(name, ranks).weights
    ours, start = expected(cell)[0], expected(cell, 0)[0]
    for key, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16
        if key.endswith("lora_B"):
            moved = (ours[key] - start[key]).norm()
            assert (tensor.float() - ours[key]).norm() <= 0.05 * moved, key
        elif key.endswith("lora_A"):  # moves by a few of bf16's steps only
            assert (tensor.float() - ours[key]).abs().max() <= 2**-8 * ours[key].abs().max(), key
        else:
            assert torch.equal(tensor.float(), start[key]), key


def test_launcher_tells_which_rank_failed(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit('no luck')\n"
        "time.sleep(2 * 3600)\n"
    )
    with pytest.raises(RuntimeError, match="rank 1 ended with 1\nno luck"):
        run_ranks(script, 2, [], log_dir=tmp_path)
    script.write_text("import os\nprint(os.environ['RANK'], os.environ['WORLD_SIZE'])\n")
    assert run_ranks(script, 2, [], log_dir=tmp_path) == ["0 2\n", "1 2\n"]


def test_launcher_ends_ranks_that_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TIME_LIMIT", 1.0)
    script = tmp_path / "hangs.py"
    script.write_text("import time\ntime.sleep(2 * 3600)\n")
    with pytest.raises(RuntimeError, match="still run after the time limit"):
        run_ranks(script, 1, [], log_dir=tmp_path)
