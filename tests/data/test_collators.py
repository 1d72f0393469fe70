import datasets
import pytest
import torch

from dschat.data.batching import build_loader
from dschat.data.collators import PairCollator, PromptCollator, SFTCollator
from dschat.models.causal_lm import position_ids_from

PAD = EOS = 2


def _sft(ids, prompt_len, **more):
    row = {"input_ids": ids, "prompt_len": prompt_len, "length": len(ids)}
    return {**row, "trained": [prompt_len, len(ids)], **more}


def test_sft_masks_come_from_lengths_where_pad_is_eos():
    batch = SFTCollator(PAD)([_sft([EOS, 5, EOS, 7, EOS], 3), _sft([8, EOS], 1)])
    assert batch.input_ids.tolist() == [[2, 5, 2, 7, 2], [8, 2, 2, 2, 2]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0]]
    assert batch.real.tolist() == [True, True]
    assert batch.input_ids.dtype == torch.int64
    assert batch.loss_mask.dtype == batch.attention_mask.dtype == batch.real.dtype == torch.bool


def test_first_token_is_never_a_target():
    rows = [_sft([5, 6, EOS], 2), _sft([7, EOS], 0)]
    batch = SFTCollator(PAD, train_on_prompt=True)(rows)
    assert batch.loss_mask.int().tolist() == [[0, 1, 1], [0, 1, 0]]
    assert SFTCollator(PAD)(rows).loss_mask.int().tolist() == [[0, 0, 1], [0, 1, 0]]


def test_several_turns_train_apart():
    rows = [_sft([9, 5, EOS, 6, 7, EOS], 4, trained=[1, 3, 4, 6]), _sft([8, 5, EOS], 1)]
    batch = SFTCollator(PAD)(rows)
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0]]


def test_pairs_are_stacked_chosen_first():
    rows = [
        {"chosen_ids": [5, 6, EOS], "rejected_ids": [5, EOS], "prompt_len": 1},
        {"chosen_ids": [7, 8, EOS], "rejected_ids": [7, 8, 9, EOS], "prompt_len": 2},
    ]
    batch = PairCollator(PAD)(rows)
    assert batch.input_ids.tolist() == [[5, 6, 2, 2], [7, 8, 2, 2], [5, 2, 2, 2], [7, 8, 9, 2]]
    assert batch.attention_mask.sum(1).tolist() == [3, 3, 2, 4]
    assert batch.answer_mask.int().tolist() == [
        [0, 1, 1, 0],
        [0, 0, 1, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 1],
    ]
    assert batch.real.tolist() == [True, True]


def test_prompts_are_padded_on_the_left_with_positions():
    batch = PromptCollator(PAD)([{"prompt_ids": [EOS, 5, 6]}, {"prompt_ids": [7]}])
    assert batch.input_ids.tolist() == [[2, 5, 6], [2, 2, 7]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1], [0, 0, 1]]
    assert position_ids_from(batch.attention_mask).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_positions_on_right_padding():
    mask = torch.tensor([[True, True, False, False]])
    assert position_ids_from(mask).tolist() == [[0, 1, 1, 1]]


def test_filler_rows_are_masked_out():
    batch = SFTCollator(PAD)([_sft([5, 6, EOS], 1, real=False)])
    assert not batch.real.any() and not batch.loss_mask.any()
    row = {"chosen_ids": [5, EOS], "rejected_ids": [6, EOS], "prompt_len": 0, "real": False}
    assert not PairCollator(PAD)([row]).answer_mask.any()


def test_batches_move_whole():
    moved = SFTCollator(PAD)([_sft([5, EOS], 1)]).to("meta")
    assert {moved.input_ids.device.type, moved.loss_mask.device.type, moved.real.device.type} == {
        "meta"
    }


def _dataset(size):
    # Row n is [n, n, ...]: its first token names it. Lengths go up and down.
    rows = [[n] * (1 + n * 7 % 13) for n in range(size)]
    return datasets.Dataset.from_list([_sft(ids, 0) for ids in rows])


def _epoch(size, batch_size, world_size, epoch=0, shuffle=True):
    """For each rank, for each of its batches, the rows that are real."""
    ranks = []
    for rank in range(world_size):
        loader = build_loader(
            _dataset(size),
            SFTCollator(PAD),
            batch_size,
            rank=rank,
            world_size=world_size,
            seed=3,
            shuffle=shuffle,
        )
        batches = list(loader.batches(epoch))
        assert loader.batches_in(epoch) == len(batches)
        assert all(1 <= len(batch.real) <= batch_size for batch in batches)
        ranks.append([batch.input_ids[batch.real, 0].tolist() for batch in batches])
    assert len({len(batches) for batches in ranks}) == 1
    return ranks


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("size", "batch_size"), [(1, 4), (5, 2), (16, 4), (17, 4), (131, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_once_an_epoch_on_any_number_of_ranks(size, batch_size, world_size, shuffle):
    ranks = _epoch(size, batch_size, world_size, shuffle=shuffle)
    rows = [row for batches in ranks for batch in batches for row in batch]
    assert sorted(rows) == list(range(size))


def test_rank_without_rows_gets_one_filler_row():
    ranks = _epoch(5, 2, 2)
    assert [len(batch) for batch in ranks[0]] == [2, 1]
    assert [len(batch) for batch in ranks[1]] == [2, 0]


def test_one_rank_and_two_ranks_see_the_same_global_batches():
    (one,), two = _epoch(37, 8, 1), _epoch(37, 4, 2)
    together = [sorted(a + b) for a, b in zip(*two, strict=True)]
    assert [sorted(batch) for batch in one] == together


def test_epochs_differ_and_repeat():
    first, second, again = (_epoch(40, 4, 1, epoch) for epoch in (0, 1, 0))
    assert first == again != second


def test_like_lengths_meet():
    loader = build_loader(
        _dataset(130), SFTCollator(PAD), 10, rank=0, world_size=1, seed=3, shuffle=True
    )
    batches = list(loader)
    # 10 rows of each of 13 lengths, one chunk: sorted, no batch needs padding.
    assert all(batch.attention_mask.all() for batch in batches)
    widths = [batch.input_ids.shape[1] for batch in batches]
    assert sorted(widths) == list(range(1, 14)) and widths != sorted(widths)


def test_evaluation_goes_by_length():
    (batches,) = _epoch(30, 4, 1, shuffle=False)
    lengths = [1 + row * 7 % 13 for batch in batches for row in batch]
    assert lengths == sorted(lengths)


def test_iterating_leaves_the_global_random_state_alone():
    loader = build_loader(
        _dataset(9), SFTCollator(PAD), 2, rank=0, world_size=1, seed=3, shuffle=True
    )
    before = torch.random.get_rng_state()
    list(loader)
    assert torch.equal(before, torch.random.get_rng_state())


def test_empty_dataset_is_an_error():
    with pytest.raises(ValueError, match="0 rows"):
        build_loader(
            _dataset(3).select([]), SFTCollator(PAD), 2, rank=0, world_size=1, seed=3, shuffle=True
        )
