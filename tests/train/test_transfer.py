"""Batches ahead of time, and the numbers of an optimizer step read together."""

import torch

from dschat.data.collators import SFTCollator
from dschat.functional.losses import mean_scale
from dschat.train.evaluation import answer_loss, trained_tokens
from dschat.train.progress import batch_counts, finite_loss
from dschat.train.steps import accumulation_groups
from dschat.train.transfer import ahead, numbers, read_sums
from tests.helpers.recorder import Recorder
from tests.helpers.tiny import PAD, tiny_llama, token_rows

CPU = torch.device("cpu")


def batches(count: int) -> list:
    rows = [
        {"input_ids": ids, "trained": [2, len(ids)], "length": len(ids)}
        for ids in token_rows(2 * count, seed=3)
    ]
    return [SFTCollator(PAD)(rows[i : i + 2]) for i in range(0, len(rows), 2)]


def test_a_group_is_on_its_way_while_the_one_before_it_is_computed():
    seen: list[int] = []

    def loader():
        for number, batch in enumerate(batches(5)):
            seen.append(number)
            yield batch

    groups = ahead(accumulation_groups(loader(), 2), CPU)
    collated, moved = next(groups)
    assert seen == [0, 1, 2, 3] and len(collated) == len(moved) == 2
    sizes = [len(moved) for _, moved in groups]
    assert sizes == [2, 1] and list(ahead([], CPU)) == []


def test_numbers_are_exact():
    values = [torch.tensor(0.1), torch.tensor(2**40 + 1), torch.tensor(3, dtype=torch.int32)]
    assert numbers(values) == [torch.tensor(0.1).item(), 2**40 + 1, 3.0] and numbers([]) == []
    parts = [{"a": torch.tensor(1.5), "b": torch.tensor(2)}, {"a": torch.tensor(3)}]
    assert read_sums(parts) == [{"a": 1.5, "b": 2.0}, {"a": 3.0}] and read_sums([]) == []


def reads_of_a_step(count: int) -> int:
    model = tiny_llama()
    group = batches(count)
    answer_loss(model, group[0])  # proofs of the model
    counts = batch_counts(group, trained_tokens)  # on the host
    with Recorder() as recorder:
        losses = []
        for batch in group:
            loss = answer_loss(model, batch)
            (loss * mean_scale(counts[0], 1)).backward()
            losses.append(loss.detach())
        finite_loss(1, losses, counts[0])
    return recorder.reads


def test_no_number_of_a_micro_batch_is_read_alone():
    """transformers itself asks once a pass whether the row's positions are those of packs."""
    assert [reads_of_a_step(1), reads_of_a_step(4)] == [1, 4]
