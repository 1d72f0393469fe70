"""Batches of pairs for a reward model's loss: margins, answers without an end, shared prompts."""

import torch

from dschat.data.batches import SharedPromptBatch
from dschat.data.collators import RewardCollator, without_end
from dschat.data.shared_prompts import is_less_work

PAD = EOS = 2


def _pair(number: int, **more):
    ids = {"chosen_ids": [5, number, EOS], "rejected_ids": [5, EOS, number, EOS]}
    return {**ids, "prompt_len": 1, **more}


def test_margins_of_rows_stand_before_the_runs_own():
    rows = [_pair(6, margin=2.5), _pair(7, margin=None), _pair(8, margin=0.0), _pair(9)]
    batch = RewardCollator(PAD, margin=1.0)(rows)
    assert batch.margin.tolist() == [2.5, 1.0, 0.0, 1.0] and batch.margin.dtype == torch.float32


def test_answers_lose_their_end_by_seed_and_content_alone():
    rows = [_pair(number) for number in range(300)]
    collate = RewardCollator(PAD, endless_share=0.3, seed=1)
    lengths = collate(rows).attention_mask.sum(-1)
    cut = 3 - lengths[:300], 4 - lengths[300:]
    # 600 draws of 0.3: 180, and 45 from there to four standard deviations
    assert 135 < sum(side.sum().item() for side in cut) < 225
    assert cut[0].tolist() != cut[1].tolist()  # each side is drawn for itself
    others = collate(rows[::-1][:100]).attention_mask.sum(-1)[:100]
    assert others.tolist() == lengths[200:300].flip(0).tolist()
    again = RewardCollator(PAD, endless_share=0.3, seed=2)(rows).attention_mask.sum(-1)
    assert again.tolist() != lengths.tolist()
    assert rows[0] == _pair(0)  # nothing is changed in place
    for share, missing in ((0.0, 0), (1.0, 600)):
        mask = RewardCollator(PAD, endless_share=share)(rows).attention_mask
        assert mask.sum().item() == 300 * (3 + 4) - missing


def test_an_answer_of_its_end_alone_keeps_it():
    row = {"chosen_ids": [5, EOS], "rejected_ids": [5, 6, EOS], "prompt_len": 1}
    assert without_end(row) == {**row, "rejected_ids": [5, 6]}


def _row(prompt: int, chosen: int, rejected: int) -> dict:
    ids = {"chosen_ids": [5] * prompt + [6] * chosen, "rejected_ids": [5] * prompt + [7] * rejected}
    return {**ids, "prompt_len": prompt, "length": prompt + max(chosen, rejected)}


def test_a_pair_in_one_row_by_hand():
    rows = [_row(3, 2, 1), {**_row(2, 1, 1), "margin": 0.5, "real": False}]
    batch = RewardCollator(PAD, share_prompts=True)(rows)
    assert isinstance(batch, SharedPromptBatch)
    assert batch.input_ids.tolist() == [[5, 5, 5, 6, 6, 7], [5, 5, 6, 7, PAD, PAD]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 1, 2, 3, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 2, 0, 0]]
    assert batch.ends.tolist() == [[4, 5], [2, 3]]
    assert batch.attention_mask.int().tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    assert batch.margin.tolist() == [0.0, 0.5] and batch.real.tolist() == [True, False]
    assert batch.sequences == 2


def test_a_row_a_pair_only_where_it_is_at_most_root_two_as_long():
    assert is_less_work([_row(30, 10, 10)])  # 50 against 40 twice
    assert not is_less_work([_row(10, 30, 30)])  # 70 against 40 twice
    assert is_less_work([_row(4, 3, 2)]) and not is_less_work([_row(4, 3, 3)])  # 81, 100: 98
    assert not isinstance(RewardCollator(PAD)([_row(30, 1, 1)]), SharedPromptBatch)
