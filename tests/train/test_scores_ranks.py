"""Scores on 1 and 2 ranks at every ZeRO stage: those of one process, and of what is saved there.

The cells of a tier run in one start of `scores_worker.py`; `tests/models/test_scores_agree.py`
holds one process to texts scored alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers import tiny
from tests.helpers.adapters import ALONE, plan, with_adapter
from tests.helpers.families import CLASSIFIED, save_family
from tests.helpers.launch import run_ranks
from tests.helpers.scores import all_ways, assert_scores, classifier_scores, scores_alone
from tests.helpers.tiers import by_tier, tiers

WORKER = Path(__file__).with_name("scores_worker.py")
FAMILIES = (*CLASSIFIED, "granite")
WAYS = dict.fromkeys((1, 2), ("0", "1", "2", "3", "3,adapter"))
CELLS = {ranks: [f"{name},{way}" for name in FAMILIES for way in WAYS[ranks]] for ranks in WAYS}
CORE: dict[int, set[str]] = {1: set(), 2: set()}


@dataclass(frozen=True)
class Found:
    """Scores of a cell by each rank, the model's own before, and the folder saved after."""

    by_rank: list[dict[str, torch.Tensor]]
    before: torch.Tensor
    folder: Path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Found]:
    """A cell by its name and the number of ranks."""
    made, lora = tmp_path_factory.mktemp("made"), LoraConfig(lora_dim=2, lora_init="B")

    @functools.cache
    def scored(name: str) -> torch.Tensor:
        base = save_family(made / f"base-{name}", name)
        model = create_critic_model(base, tiny.byte_tokenizer(), torch.float32, init_head=True)
        model, out = with_adapter(model, lora), made / name
        save_hf_format(model, tiny.byte_tokenizer(), out, ALONE, plan("both", base, lora, out))
        return scores_alone(model)

    def run(ranks: int, cells: list[str]) -> dict[str, Found]:
        before = {cell: scored(cell.split(",")[0]) for cell in cells}
        output = tmp_path_factory.mktemp(f"on-{ranks}")
        run_ranks(WORKER, ranks, [str(made), str(output), *cells], log_dir=output)
        parts = [torch.load(output / f"scores-{rank}.pt") for rank in range(ranks)]
        return {c: Found([part[c] for part in parts], before[c], output / c) for c in cells}

    by_ranks = {n: by_tier(CELLS[n], CORE[n], functools.partial(run, n)) for n in WAYS}
    return lambda cell, ranks: by_ranks[ranks](cell)


@pytest.mark.parametrize("cell", tiers(CELLS[1], CORE[1]))
def test_scores_agree_on_one_rank(found: Callable[[str, int], Found], cell: str):
    agree(found(cell, 1), cell)


@pytest.mark.parametrize("cell", tiers(CELLS[2], CORE[2]))
def test_scores_agree_on_two_ranks(found: Callable[[str, int], Found], cell: str):
    agree(found(cell, 2), cell)


def agree(result: Found, cell: str) -> None:
    """Of what was loaded, and with an adapter that moved in the engine, before and after saving."""
    for scores in result.by_rank:
        assert_scores(scores["loaded"], result.before)
    after = result.by_rank[0]["moved"][0]
    assert (after - result.before).abs().max() > 0.1
    for scores in result.by_rank:
        assert_scores(scores["moved"], after)
    only_merged = cell.endswith(",adapter")  # PEFT puts one adapter on a base
    for folder in (result.folder, *([] if only_merged else [result.folder / "adapter"])):
        loaded = create_critic_model(str(folder), tiny.byte_tokenizer(), torch.float32).eval()
        assert_scores(all_ways(loaded), after)
    if cell.split(",")[0] in CLASSIFIED:
        assert_scores(classifier_scores(result.folder), after)
