"""Rollouts on two ranks that have nothing in common but the number of passes."""

from pathlib import Path

import pytest
import torch

from tests.helpers.launch import run_ranks
from tests.helpers.rounding import LOGITS
from tests.rlhf.rollout_worker import CELLS
from tests.rlhf.tiny_roles import assert_trained_alike

# Every layer is gathered anew for every sampled token: a minute.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory) -> list[dict]:
    """Of both ranks."""
    out = tmp_path_factory.mktemp("ranks")
    args = [str(folders["llama"].actor.parent), str(out)]
    run_ranks(Path(__file__).with_name("rollout_worker.py"), 2, args, log_dir=out)
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("rank", [0, 1])
def test_rows_groups_and_ends(results, name, rank):
    experiences = results[rank][name]["cut"]["experiences"]
    assert [len(e["model_scores"]) for e in experiences] == [4, 4, 4]
    assert torch.cat([e["group"] for e in experiences]).tolist() == [i // 2 for i in range(12)]
    real = torch.cat([e["real"] for e in experiences]).tolist()
    assert real == [True] * (12 if rank == 0 else 10) + [False] * (0 if rank == 0 else 2)
    for e in experiences:
        assert e["answer_mask"].shape[1] == (3 if rank == 0 else 6)
        assert e["ended"].all() if rank == 0 else not e["ended"].any()


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("rank", [0, 1])
def test_logprobs_are_those_of_the_whole_model(results, name, rank):
    cut = results[rank][name]["cut"]
    for e, plain in zip(cut["experiences"], cut["plain"], strict=True):
        torch.testing.assert_close(e["logprobs"], plain, atol=2 * LOGITS, rtol=0)
        torch.testing.assert_close(e["ref_logprobs"], plain, atol=2 * LOGITS, rtol=0)


@pytest.mark.parametrize("name", CELLS)
def test_the_update_does_not_depend_on_the_blocks(results, name):
    cut, whole = results[0][name]["cut"], results[0][name]["whole"]
    assert cut["statistics"] == pytest.approx(whole["statistics"], abs=LOGITS)
    assert_trained_alike(cut["actor"], whole["actor"], CELLS[name], steps=3)
