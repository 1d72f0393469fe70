"""Micro-batches of like length: every row once, as narrow as it may be, with unchanged steps."""

from dataclasses import replace

import pytest
import torch

from dschat.rlhf.experience import Experience, in_micro_batches
from dschat.rlhf.micro_batches import RowLengths, by_length, dealt
from dschat.rlhf.static_model import StaticModel
from dschat.rlhf.static_rollout import StaticRollout
from tests.helpers.rounding import LOGITS
from tests.rlhf.tiny_roles import LORA, Setting, end_after, ppo_trainer, prompts

LENGTHS = torch.tensor([[3, 9], [1, 1], [7, 2], [5, 30], [2, 2], [6, 6], [1, 12], [4, 4]])


def rows(prompt: torch.Tensor, answer: torch.Tensor) -> RowLengths:
    return RowLengths(prompt, answer, torch.ones(len(prompt), dtype=torch.bool))


def test_lengths_are_those_of_the_masks():
    prompt, answer = torch.arange(6) >= 6 - LENGTHS[:, :1] % 6, torch.arange(30) < LENGTHS[:, 1:]
    found = RowLengths.of(torch.cat([prompt, answer], 1), 6, LENGTHS[:, 0] > 1)
    assert torch.equal(found.prompt, LENGTHS[:, 0] % 6) and torch.equal(found.answer, LENGTHS[:, 1])
    assert found.real.tolist() == (LENGTHS[:, 0] > 1).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 8, 20])
def test_rows_of_like_length_meet(size):
    found = by_length(rows(*LENGTHS.T), size)
    order = torch.cat([part.index for part in found])
    assert sorted(order.tolist()) == list(range(8))
    tokens = LENGTHS.sum(1)[order].tolist()
    assert tokens == sorted(tokens, reverse=True)  # the pass that needs most memory is the first
    for part in found:
        assert (part.prompt, part.answer) == tuple(LENGTHS[part.index].amax(0).tolist())


@pytest.mark.parametrize("size, accumulated", [(1, 4), (2, 2), (4, 1), (2, 3)])
def test_lengths_do_not_decide_which_rows_a_step_has(size, accumulated):
    """Nor does a rollout before it that ends amid a group."""
    lengths = [rows(*LENGTHS[:2].T), rows(*LENGTHS.T)]
    equal = [rows(*torch.ones_like(part).T) for part in (LENGTHS[:2], LENGTHS)]
    steps = []
    for rollouts in (lengths, equal):
        plan = dealt(rollouts, size, accumulated, torch.Generator().manual_seed(1))
        parts = [(n, part.index.tolist()) for n, parts in enumerate(plan) for part in parts]
        groups = [parts[i : i + accumulated] for i in range(0, len(parts), accumulated)]
        steps.append([sorted((n, row) for n, index in g for row in index) for g in groups])
    assert steps[0] == steps[1]
    assert len({row for step in steps[0] for row in step}) == 10


def narrow(e: Experience, trainer, size: int) -> list[Experience]:
    return list(in_micro_batches([e], size, 1, trainer.generator, is_first=True))


def test_padding_that_a_micro_batch_does_not_need_changes_nothing(load_roles):
    """Rewards and log-probabilities of rows by themselves are those of rows side by side."""
    setting = Setting(lora=LORA, micro_batch=1, accumulation=4)
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting, answer=8)
    end_after(roles.actor.module, [2, None, 5, 3])
    (e,) = trainer.rollout([prompts(width=20)])
    assert e.answer_mask.sum(-1).tolist() == [2, 8, 5, 3]
    alone = narrow(e, trainer, 1)
    assert [len(part.sequences[0]) for part in alone] == sorted(
        e.attention_mask.sum(-1).tolist(), reverse=True
    )
    assert all(part.attention_mask.all() for part in alone)
    wide = replace(e, micro_batches=None)
    for part in in_micro_batches([wide], 4, 1, torch.Generator().manual_seed(0)):
        text = part.sequences, part.attention_mask, part.answer_mask.shape[1]
        assert len(part) == 4
        torch.testing.assert_close(
            roles.reward_scores(*text), part.model_scores, atol=LOGITS, rtol=0
        )
        torch.testing.assert_close(
            roles.reference_logprobs(*text), part.ref_logprobs, atol=LOGITS, rtol=0
        )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_scoring_is_over_the_micro_batches_of_the_first_epoch(load_roles, dtype):
    """Whatever the dtype rounds: the policy's log-probabilities before its steps are the scored."""
    setting = Setting(dtype=dtype, micro_batch=2)
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting, per_device_generation_batch_size=8, answer=8)
    end_after(roles.actor.module, [2, None, 5, 3, 1, 8, 4, 4])
    (e,) = trainer.rollout([prompts(8)])
    parts = narrow(e, trainer, 2)
    assert len({part.sequences.shape[1] for part in parts}) > 1
    for part in parts:
        assert torch.equal(trainer.updates.policy_scores(part).logprobs, part.logprobs)
    # A second epoch is dealt anew, and so is what was put together of several rollouts.
    again = list(in_micro_batches([e], 2, 1, trainer.generator))
    assert [p.group.tolist() for p in again] != [p.group.tolist() for p in parts]
    assert e.rows(torch.arange(8)).micro_batches is None


def test_evaluation_draws_no_order(load_roles):
    setting = Setting(micro_batch=2)
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting)
    trainer.engine = StaticRollout(StaticModel(roles.actor.module), roles.tokenizer, 4)
    before = trainer.generator.get_state()
    trainer.evaluate([prompts()])
    assert torch.equal(trainer.generator.get_state(), before)
    trainer.rollout([prompts()])
    assert not torch.equal(trainer.generator.get_state(), before)
