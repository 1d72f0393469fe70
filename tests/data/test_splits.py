import numpy as np
import pytest

from dschat.data.config import parse_proportions
from dschat.data.store import load_source, phase_split
from dschat.errors import UserError


def _sizes(size, proportions):
    return [len(phase_split(size, 7, proportions, phase)) for phase in (1, 2, 3)]


def test_sizes_by_hand():
    assert _sizes(103, (0, 5, 5)) == [0, 52, 51]
    assert _sizes(10, (2, 4, 4)) == [2, 4, 4]
    # bounds 0.2·7 = 1.4 → 1, 0.6·7 = 4.2 → 4, 7
    assert _sizes(7, (2, 4, 4)) == [1, 3, 3]
    assert _sizes(0, (2, 4, 4)) == [0, 0, 0]
    assert _sizes(5, (10,)) == [5, 5, 5]


@pytest.mark.parametrize("proportions", [(2, 4, 4), (0, 5, 5), (0.1, 0.2, 0.7), (1, 0, 2)])
def test_phases_partition_the_rows_within_one_of_the_proportion(proportions):
    for size in range(0, 60):
        parts = [phase_split(size, 3, proportions, phase) for phase in (1, 2, 3)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(size))
        for part, share in zip(parts, proportions, strict=True):
            assert abs(len(part) - size * share / sum(proportions)) < 1


def test_split_depends_on_the_seed_alone():
    first, again, other = (phase_split(500, seed, (2, 4, 4), 2) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert set(first.tolist()) != set(other.tolist())


@pytest.mark.parametrize(("size", "held"), [(2, 1), (9, 1), (20, 2), (105, 10)])
def test_holdout_is_a_tenth_and_at_least_one_row(size, held, write_rows, tmp_path):
    path = write_rows([{"prompt": f"{n:03d}"} for n in range(size)])
    source, again = (load_source(path, 5, tmp_path / "cache") for _ in range(2))
    assert len(source.test) == source.held_out == held
    assert sorted([*source.train["prompt"], *source.test["prompt"]]) == [
        f"{n:03d}" for n in range(size)
    ]
    assert source.test["prompt"] == again.test["prompt"]


def test_unknown_phase_is_an_error():
    with pytest.raises(ValueError, match="phase 0"):
        phase_split(10, 1, (2, 4, 4), 0)


def test_parse():
    assert parse_proportions("2,4,4") == (2.0, 4.0, 4.0)
    assert parse_proportions(" 10 ") == (10.0,)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2,x,4", "not a number"),
        ("", "not a number"),
        ("2,-4,4", "negative"),
        ("2,nan,4", "negative or infinite"),
        ("0,0,0", "all zero"),
        ("0", "all zero"),
        ("2,4", "has 2 numbers"),
    ],
)
def test_bad_proportions_are_refused(text, reason):
    with pytest.raises(UserError, match=f"data_split.*{reason}"):
        parse_proportions(text)
