from dataclasses import fields, replace

import pytest
import torch

from dschat.rlhf.experience import Experience, in_micro_batches
from dschat.train.steps import accumulation_groups


def experience(rows: int, first: int = 0, prompt: int = 3, answer: int = 4) -> Experience:
    """Every number of row i says which row it is: `first` + i."""
    names = torch.arange(first, first + rows)

    def full(width: int) -> torch.Tensor:
        return names[:, None].expand(rows, width).clone()

    return Experience(
        sequences=full(prompt + answer),
        attention_mask=torch.ones(rows, prompt + answer, dtype=torch.bool),
        answer_mask=torch.ones(rows, answer, dtype=torch.bool),
        ended=names % 2 == 0,
        real=names % 3 != 0,
        logprobs=full(answer).float(),
        ref_logprobs=full(answer).float() + 0.25,
        values=full(answer).float() + 0.5,
        model_scores=names.float(),
        group=names.long(),
        generation_seconds=1.5,
    )


def test_prompt_length_and_answers():
    e = experience(2, prompt=5, answer=3)
    assert e.prompt_length == 5
    e.sequences[:, 5:] = torch.tensor([[7, 8, 9], [1, 2, 3]])
    assert e.answers.tolist() == [[7, 8, 9], [1, 2, 3]]


def test_rows_pick_every_column_in_order():
    e = experience(5).with_returns(torch.zeros(5, 4) + 8, torch.arange(20.0).view(5, 4))
    picked = e.rows(torch.tensor([3, 1]))
    assert picked.model_scores.tolist() == [3.0, 1.0]
    assert picked.returns.tolist() == [[12.0, 13.0, 14.0, 15.0], [4.0, 5.0, 6.0, 7.0]]
    for field in fields(Experience):
        column = getattr(e, field.name)
        if isinstance(column, torch.Tensor):
            assert torch.equal(getattr(picked, field.name), column[[3, 1]]), field.name
    assert e.model_scores.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]  # untouched


def test_rows_leave_missing_returns_missing():
    assert experience(3).rows(torch.tensor([0])).advantages is None


@pytest.mark.parametrize("size, sizes", [(1, [1] * 9), (2, [2, 2, 1, 2, 2]), (8, [5, 4])])
def test_micro_batches_hold_every_row_once(size, sizes):
    rollouts = [experience(5), experience(4, first=100, prompt=6, answer=2)]
    batches = list(in_micro_batches(rollouts, size, 1, torch.Generator().manual_seed(0)))
    assert [len(b) for b in batches] == sizes
    seen = sorted(row for b in batches for row in b.model_scores.tolist())
    assert seen == [0, 1, 2, 3, 4, 100, 101, 102, 103]
    for b in batches:
        # Rows of two rollouts differ in width, so that they never meet; columns stay together.
        assert b.answer_mask.shape[1] == (4 if b.model_scores.max() < 100 else 2)
        assert torch.equal(b.model_scores, b.sequences[:, 0].float())
        assert torch.equal(b.ref_logprobs, b.logprobs + 0.25)
        assert torch.equal(b.ended, b.sequences[:, 0] % 2 == 0)


def test_micro_batches_are_drawn_anew_each_time():
    generator = torch.Generator().manual_seed(0)
    orders = [
        [
            row
            for b in in_micro_batches([experience(20)], 4, 1, generator)
            for row in b.model_scores.tolist()
        ]
        for _ in range(2)
    ]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    again = in_micro_batches([experience(20)], 4, 1, torch.Generator().manual_seed(0))
    assert [row for b in again for row in b.model_scores.tolist()] == orders[0]


def groups_of(rollouts: list[Experience], size: int, accumulated: int) -> list[list[Experience]]:
    batches = in_micro_batches(rollouts, size, accumulated, torch.Generator().manual_seed(3))
    return list(accumulation_groups(batches, accumulated))


def short(rows: int, real: int) -> Experience:
    return replace(experience(rows), real=torch.arange(rows) < real)


def test_the_rows_of_a_group_do_not_depend_on_the_micro_batch():
    def group(size: int) -> set[float]:
        first, *_ = groups_of([experience(8)], size, 4 // size)
        return {row for b in first for row in b.model_scores.tolist()}

    assert group(1) == group(2) == group(4)


@pytest.mark.parametrize(
    "rows, real, size, accumulated, expected",
    [
        (16, 2, 2, 1, [2, 0, 0, 0, 0, 0, 0, 0]),
        (32, 17, 16, 1, [9, 8]),
        (32, 17, 4, 4, [9, 8]),
        (32, 17, 1, 16, [9, 8]),
        (48, 33, 16, 2, [17, 16]),  # the second group has 16 places
        (48, 17, 16, 1, [9, 8, 0]),
        (12, 11, 5, 1, [5, 4, 2]),  # places are 5, 5, 2
        (12, 6, 5, 1, [3, 3, 0]),
        (8, 0, 4, 1, [0, 0]),
        (8, 8, 4, 1, [4, 4]),
    ],
)
def test_real_rows_fill_as_few_groups_as_possible_evenly(rows, real, size, accumulated, expected):
    full = [
        len(b) for b in in_micro_batches([short(rows, rows)], size, accumulated, torch.Generator())
    ]
    groups = groups_of([short(rows, real)], size, accumulated)
    assert [len(b) for group in groups for b in group] == full  # as on a rank without fillers
    assert [sum(int(b.real.sum()) for b in group) for group in groups] == expected
    seen = sorted(row for group in groups for b in group for row in b.model_scores.tolist())
    assert seen == list(range(rows))


def test_a_short_rollout_is_filled_up_by_the_next():
    """Three rollouts of one mini-batch each, groups of two: not 8 rows and then 1."""
    rollouts = [short(4, 4), short(4, 4), short(4, 1)]
    groups = groups_of(rollouts, 4, 2)
    assert [sum(int(b.real.sum()) for b in group) for group in groups] == [5, 4]
