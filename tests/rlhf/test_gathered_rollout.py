"""ZeRO-3 on two ranks: complete weights are gathered once for a rollout, and shards come back."""

from pathlib import Path

import pytest
import torch

from tests.helpers.launch import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory) -> list[dict]:
    """Of both ranks, whose prompts and lengths of answers differ."""
    out = tmp_path_factory.mktemp("ranks")
    args = [str(folders["llama"].actor.parent), str(out)]
    run_ranks(Path(__file__).with_name("gather_worker.py"), 2, args, log_dir=out)
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", ["whole", "static"])
def test_answers_are_those_of_layer_by_layer_with_far_fewer_collectives(results, name):
    for rank in results:
        assert torch.equal(rank[name]["answers"], rank["layers"]["answers"])
        # Layer by layer gathers in each of 6 passes; on whole weights in none.
        assert rank[name]["calls"] <= rank["layers"]["calls"] / 6


@pytest.mark.parametrize("name", ["whole", "static"])
def test_the_weights_are_shards_again_and_train_as_if_undisturbed(results, name):
    assert all(rank[name]["shards"] for rank in results)
    expected = results[0]["layers"]["weights"]
    assert results[0][name]["weights"].keys() == expected.keys()
    for key, tensor in results[0][name]["weights"].items():
        assert torch.equal(tensor, expected[key]), key
