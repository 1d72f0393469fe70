"""Batches by tokens and packs: within their limits, the same rows on any number of ranks."""

from itertools import chain

import datasets
import numpy as np
import pytest

from dschat.data.batching import build_loader
from dschat.data.collators import PackedCollator, PairCollator, SFTCollator
from dschat.data.token_batches import PackedBatches, TokenBudgetBatches, best_fit_decreasing
from dschat.train.evaluation import answer_loss, trained_tokens
from tests.helpers.rounding import IN_A_ROW
from tests.helpers.tiny import tiny_llama

PAD = 0


def _lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, longest + 1, count).tolist()


def _dataset(lengths: list[int]) -> datasets.Dataset:
    """Row n begins with token n + 1, which names it."""
    rows = [[n + 1] + [3] * (length - 1) for n, length in enumerate(lengths)]
    return datasets.Dataset.from_list(
        [{"input_ids": ids, "trained": [1, len(ids)], "length": len(ids)} for ids in rows]
    )


def _loaders(lengths, sampler, world_size, collator=PackedCollator):
    data, options = _dataset(lengths), {"seed": 3, "shuffle": True, "world_size": world_size}
    return [
        build_loader(data, collator(PAD), sampler, rank=rank, **options)
        for rank in range(world_size)
    ]


def _names(batch) -> list[int]:
    """The rows of a batch, by the tokens that begin a sequence."""
    if hasattr(batch, "position_ids"):
        begins = batch.attention_mask & (batch.position_ids == 0) & batch.real[:, None]
        return [token - 1 for token in batch.input_ids[begins].tolist()]
    return [token - 1 for token in batch.input_ids[batch.real, 0].tolist()]


SAMPLERS = {
    "tokens": (TokenBudgetBatches(64), SFTCollator),
    "packed": (PackedBatches(2, 32), PackedCollator),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 7, 120])
def test_every_row_once_an_epoch_and_as_many_batches_on_every_rank(name, world_size, count):
    sampler, collator = SAMPLERS[name]
    loaders = _loaders(_lengths(count, 32), sampler, world_size, collator)
    for epoch in range(2):
        ranks = [list(loader.batches(epoch)) for loader in loaders]
        assert {len(batches) for batches in ranks} == {loaders[0].batches_in(epoch)}
        rows = [row for batches in ranks for batch in batches for row in _names(batch)]
        assert sorted(rows) == list(range(count))


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_rank_and_two_see_the_same_rows_in_a_window(name):
    """Two micro-batches of one rank are one of each of two; packs, twice as many on one."""
    lengths = _lengths(90, 32)
    if name == "tokens":
        (one,), two = (_loaders(lengths, TokenBudgetBatches(64), n, SFTCollator) for n in (1, 2))
    else:
        (one,), two = (_loaders(lengths, PackedBatches(4 // n, 32), n) for n in (1, 2))
    one = [sorted(_names(batch)) for batch in one]
    if name == "tokens":
        one = [sorted(chain(*one[at : at + 2])) for at in range(0, len(one), 2)]
    assert one == [sorted(_names(a) + _names(b)) for a, b in zip(*two, strict=True)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_epochs_differ_and_repeat(name):
    # One pack a batch: in larger ones the same packs could meet anew.
    sampler, collator = {**SAMPLERS, "packed": (PackedBatches(1, 32), PackedCollator)}[name]
    (loader,) = _loaders(_lengths(120, 32), sampler, 1, collator)
    seen = [[sorted(_names(batch)) for batch in loader.batches(epoch)] for epoch in (0, 1, 0)]
    assert seen[0] == seen[2]
    assert sorted(seen[0]) != sorted(seen[1])  # other rows meet, not the same in another order


def test_batches_by_tokens_stay_within_them_and_are_nearly_full():
    (loader,) = _loaders(_lengths(1000, 32), TokenBudgetBatches(256), 1, SFTCollator)
    sizes = [batch.input_ids.numel() for batch in loader]
    assert max(sizes) <= 256
    assert np.mean(sizes) > 0.9 * 256
    real = sum(int(batch.attention_mask.sum()) for batch in loader)
    assert real > 0.95 * sum(sizes)


def test_pairs_count_twice():
    lengths = _lengths(60, 32)
    rows = [
        {"chosen_ids": [5] * n, "rejected_ids": [5] * 2, "prompt_len": 1, "length": n}
        for n in lengths
    ]
    options = {"rank": 0, "world_size": 1, "seed": 1, "shuffle": True}
    data = datasets.Dataset.from_list(rows)
    loader = build_loader(data, PairCollator(PAD), TokenBudgetBatches(128, sequences=2), **options)
    sizes = [batch.input_ids.numel() for batch in loader]
    assert max(sizes) <= 128 and sum(sizes) / len(sizes) > 100


def test_packs_by_hand():
    # 7 opens a bin, 5 another; 3 leaves the first full; 2, 2 fill the second but for one.
    assert best_fit_decreasing([3, 7, 2, 5, 2], 10) == [[1, 0], [3, 2, 4]]
    with pytest.raises(ValueError, match="row of 11 tokens"):
        best_fit_decreasing([11], 10)


def test_packs_are_full():
    lengths = _lengths(5000, 512)
    packs = best_fit_decreasing(lengths, 512)
    assert sorted(item for pack in packs for item in pack) == list(range(5000))
    assert max(sum(lengths[item] for item in pack) for pack in packs) <= 512
    assert sum(lengths) > 0.97 * 512 * len(packs)


def test_the_loss_of_an_epoch_does_not_depend_on_the_grouping():
    model, lengths = tiny_llama(), _lengths(40, 32)
    sums = []
    for sampler, collator in (
        (3, SFTCollator),
        (TokenBudgetBatches(64), SFTCollator),
        (PackedBatches(2, 40), PackedCollator),
    ):
        (loader,) = _loaders(lengths, sampler, 1, collator)
        batches = list(loader)
        total = sum(answer_loss(model, batch).item() for batch in batches)
        sums.append((total, sum(int(trained_tokens(batch)) for batch in batches)))
    assert {tokens for _, tokens in sums} == {sum(lengths) - 40}
    assert sums[1][0] == pytest.approx(sums[0][0], rel=IN_A_ROW)
    assert sums[2][0] == pytest.approx(sums[0][0], rel=IN_A_ROW)
