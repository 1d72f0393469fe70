"""Groups without spread give way to those of further prompts; shapes and counts stay."""

import dataclasses
import itertools

import datasets
import pytest
import torch

from dschat.data.batches import PromptBatch
from dschat.data.batching import build_loader
from dschat.data.collators import PromptCollator
from dschat.rlhf.dynamic_sampling import SparePrompts, resampled
from dschat.rlhf.experience import Experience, stacked
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.ppo_statistics import zero_spread

PAD = 9
CONFIG = PPOConfig.of(
    advantage_estimator="grpo",
    answers_per_prompt=2,
    per_device_generation_batch_size=2,
    dynamic_sampling_rounds=3,
)


def rollout(rewards: list[float], name: int, prompt: int, answer: int, real: int = 4) -> Experience:
    """Four rows, two answers to each of two prompts, of tokens that name the rollout."""
    rows = len(rewards)
    ids = torch.full((rows, prompt + answer), name) + 10 * torch.arange(rows)[:, None]
    is_real = torch.arange(rows) < real
    mask = torch.ones(rows, answer, dtype=torch.bool) & is_real[:, None]
    numbers = torch.full((rows, answer), -0.5 - name)
    return Experience(
        sequences=ids,
        attention_mask=torch.ones_like(ids).bool(),
        answer_mask=mask,
        ended=torch.ones(rows, dtype=torch.bool),
        real=is_real,
        logprobs=numbers,
        ref_logprobs=numbers,
        values=None,
        model_scores=None,
        group=torch.arange(rows) // 2 + 10 * name,
        rewards=torch.tensor(rewards),
        scored=torch.ones(rows, dtype=torch.bool),
        generation_seconds=1.0,
        columns=tuple({"row": (name, row)} for row in range(rows)),
    )


class Spare:
    """Counts what is taken."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def take(self, count: int) -> list[PromptBatch]:
        self.taken.append(count)
        return []


def test_groups_are_exchanged_round_by_round():
    first = [rollout([1, 1, 0, 1], 1, prompt=2, answer=3), rollout([0, 0, 1, 1], 2, 4, 2)]
    rounds = [
        [rollout([0, 0, 1, 1], 3, 3, 3), rollout([2, 2, 0, 3], 4, 5, 4)],  # one group of use
        [rollout([0, 4, 5, 0], 5, 1, 1)],  # two; the second is one too many
        [],
    ]
    spare, calls = Spare(), iter(rounds)
    result = resampled(first, spare, lambda _: next(calls), CONFIG, PAD)
    # Three groups lacked spread: two batches of two prompts, then one for those still missing.
    assert spare.taken == [2, 1]
    assert len(result.drawn) == 5
    assert result.statistics == {
        "resampling_rounds": 2.0,
        "resampled": 0.75,
        "frac_zero_std_drawn": 0.75,
    }
    trained = result.trained
    rows = [row["row"] for e in trained for row in e.columns]
    assert rows == [(4, 2), (4, 3), (1, 2), (1, 3), (5, 0), (5, 1), (5, 2), (5, 3)]
    assert [e.group.tolist() for e in trained] == [[10, 10, 11, 11], [20, 20, 21, 21]]
    assert zero_spread(trained, 0.0) == 0.0
    # No wider than the longest prompt and answer in it, padded outside of them.
    assert trained[0].sequences.tolist()[0] == [24] * 9
    assert trained[0].sequences.tolist()[2] == [PAD] * 3 + [21] * 5 + [PAD]
    assert trained[0].answer_mask.sum(1).tolist() == [4, 4, 3, 3]
    assert trained[0].logprobs[2].tolist() == [-1.5, -1.5, -1.5, 0.0]
    assert trained[1].sequences.shape == (4, 2) and trained[1].prompt_length == 1


def test_what_has_spread_or_finds_none_stays_as_it_is():
    spare = Spare()
    first = [rollout([1, 0, 0, 1], 1, 2, 3)]
    result = resampled(first, spare, lambda _: [], CONFIG, PAD)
    assert result.trained is first and spare.taken == []
    # A filler group is nobody's; rounds are bounded; an answer without a score has no spread.
    alike = rollout([1, 1, 0, 1], 1, 2, 3, real=2)
    unscored = rollout([1, 0, 3, 3], 3, 2, 3)
    unscored = dataclasses.replace(unscored, scored=torch.tensor([True, False, True, True]))
    result = resampled([alike], spare, lambda _: [unscored], CONFIG, PAD)
    assert spare.taken == [1, 1, 1] and result.trained[0] is alike
    assert result.statistics["resampled"] == 0 and result.statistics["resampling_rounds"] == 3
    assert result.statistics["frac_zero_std_drawn"] == 1.0


def test_a_missing_end_makes_spread_where_it_costs():
    alike = rollout([1, 1, 0, 1], 1, 2, 3, real=2)
    alike = dataclasses.replace(alike, ended=torch.tensor([True, False, True, True]))
    config = dataclasses.replace(CONFIG, missing_eos_penalty=1.0)
    assert resampled([alike], Spare(), lambda _: [], config, PAD).statistics["resampled"] == 0
    assert resampled([alike], Spare(), lambda _: [], config, PAD).trained[0] is alike


def test_stacked_rows_are_padded_outside_of_prompt_and_answer():
    one, other = rollout([1, 0, 1, 0], 1, 2, 3), rollout([1, 0, 1, 0], 2, 3, 1)
    both = stacked([one, other], PAD)
    assert both.sequences.shape == (8, 6) and both.generation_seconds == 0.0
    again = both.rows(torch.arange(4)).narrowed(one.prompt_length, one.answer_mask.shape[1])
    for field in dataclasses.fields(one):
        before, after = getattr(one, field.name), getattr(again, field.name)
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after), field.name


def prompts() -> SparePrompts:
    rows = datasets.Dataset.from_list([{"prompt_ids": [n] * 2, "length": 2} for n in range(7)])
    loader = build_loader(rows, PromptCollator(PAD), 3, rank=0, world_size=1, seed=5, shuffle=True)
    return SparePrompts(loader)


@pytest.mark.parametrize("stopped", [1, 3, 4])
def test_spare_prompts_go_on_where_a_checkpoint_left_them(stopped):
    """Three batches an epoch, each epoch in an order of its own."""
    whole, first, second = prompts(), prompts(), prompts()
    expected = [batch.input_ids[:, 0].tolist() for batch in whole.take(6)]
    for epoch in (expected[:3], expected[3:]):
        assert sorted(itertools.chain(*epoch)) == [*range(7)]
    assert expected[:3] != expected[3:]
    first.take(stopped)
    second.load_state_dict(first.state_dict())
    assert [b.input_ids[:, 0].tolist() for b in second.take(6 - stopped)] == expected[stopped:]
