"""Functions of whole batches: what they get, what they may return, what has no score."""

import dataclasses

import numpy as np
import pytest
import torch

from dschat.data.columns import KeptColumns
from dschat.data.config import DataConfig
from dschat.errors import UserError
from dschat.rlhf.advantages import whitened, with_advantages
from dschat.rlhf.experience import Experience, filled
from dschat.rlhf.part_config import RewardConfig
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.ppo_statistics import rollout_statistics, zero_spread
from dschat.rlhf.reward_functions import RewardFunction
from dschat.rlhf.rewards import Rewards
from tests.helpers.tiny import byte_tokenizer
from tests.rlhf.hand_made import sampled

COLUMNS = ({"answer": 3, "level": "a"}, {"answer": None}, {"answer": 9})


def made(*functions, weights=()) -> Rewards:
    """Rewards of functions alone, by their own names."""
    loaded = tuple(RewardFunction.of(f"m:{f.__name__}", f) for f in functions)
    names = tuple(f.name for f in loaded)
    return Rewards(RewardConfig(names, reward_function_weight=weights), loaded)


def applied(rewards: Rewards) -> Experience:
    """The rollout in hand_made.py, a filler row last, without a reward model."""
    e = dataclasses.replace(sampled(), model_scores=None, columns=COLUMNS)
    return rewards.applied(e, byte_tokenizer())


def test_a_batch_is_what_its_real_rows_say():
    called = []

    def everything(prompts, answers, **columns):
        called.append((prompts, answers, columns))
        return [1.0, 2]

    def named(prompts, answers, answer, level="none", *, missing=7):
        called.append((answer, level, missing))
        return (None, 3.0)

    rewards = made(everything, named, weights=(1.0, 0.5))
    e = applied(rewards)
    columns = {"answer": [3, None], "level": ["a", None]}
    assert called == [(["q: b", "q"], ["yes", "no!!"], columns), ([3, None], ["a", None], 7)]
    assert e.function_scores.tolist() == [[1.0, 0.0], [2.0, 3.0], [0.0, 0.0]]
    assert e.function_scored.tolist() == [[True, False], [True, True], [False, False]]
    assert e.rewards[:2].tolist() == [1.0, 3.5] and e.counted.tolist() == [True, True, False]
    figures = rewards.statistics([e])
    assert figures == {
        "reward_std": 1.25,
        "rewards/everything": 1.5,
        "rewards/named": 3.0,  # over the answer that it scored
        "unscored": 0.0,
    }
    kept = rewards.reading(DataConfig(data_path=("d",))).read.kept
    assert (kept.needed, kept.others, kept.everything) == (("answer",), ("level", "missing"), True)
    assert not made(lambda prompt, answer: 1.0).reading(DataConfig()).read.kept


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "returned 'None' for 2 answers: return a list of 2 numbers"),
        (torch.ones(3), "returned 3 scores for 2 answers: return a list of 2 numbers"),
        (torch.ones(()), "returned '1.0' for 2 answers: return a list"),
        (np.ones((2, 1)), "returned [1.0] for the prompt 'q: b' and the answer 'yes': return"),
        (np.array([1.0, np.nan]), "returned nan for the prompt 'q' and the answer 'no!!'"),
        ([10**400, 1.0], f"returned {10**79} for the prompt 'q: b' and the answer 'yes': return"),
        ([1.0], "returned 1 scores for 2 answers: return a list of 2 numbers"),
        ([1.0, "b"], "returned 'b' for the prompt 'q' and the answer 'no!!': return a list of 2"),
        ([float("nan"), 1.0], "returned nan for the prompt 'q: b' and the answer 'yes'"),
        (KeyError("x"), "fails (KeyError: 'x') for 2 answers, the first for the prompt 'q: b'"),
        (KeyboardInterrupt("b"), "fails (KeyboardInterrupt: b) for 2 answers, the first for the"),
        (SystemExit(0), "fails (SystemExit: 0) for 2 answers, the first for the prompt 'q: b'"),
    ],
)
def test_what_is_no_list_of_scores_is_one_line(returned, words):
    def function(prompts, answers):
        if isinstance(returned, BaseException):
            raise returned
        return returned

    with pytest.raises(UserError) as caught:
        applied(made(function))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "returned",
    [
        torch.tensor([1.0, 0.0], requires_grad=True),
        np.array([True, False]),
        np.array([1, 0], dtype=np.float16),
        np.array([1.0, 0.0], dtype=object),
        [np.bool_(True), torch.tensor(0, dtype=torch.int8)],
        (True, np.float32(0)),
    ],
)
def test_arrays_and_tensors_are_their_numbers(returned):
    assert applied(made(lambda prompts, answers: returned)).rewards[:2].tolist() == [1.0, 0.0]
    one = RewardFunction.of("m:f", lambda prompt, answer: returned[len(answer) - 3])
    assert one.scores(["", ""], ["yes", "no!!"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda prompts, completions: [], "its parameters are prompts, completions; a function of"),
        (lambda completions, **columns: [], "called as <lambda>(prompt, answer), which does not"),
        (lambda prompts, answers, extra, /: [], "missing a required argument: 'extra'"),
    ],
)
def test_functions_of_neither_form_are_refused(function, words):
    with pytest.raises(UserError) as caught:
        RewardFunction.of("m:f", function)
    assert words in str(caught.value) and "(prompts, answers, **columns)" in str(caught.value)


def test_a_batch_without_real_rows_asks_for_nothing():
    def fails(prompts, answers):
        raise AssertionError

    e = dataclasses.replace(sampled(), model_scores=None, real=torch.zeros(3, dtype=torch.bool))
    assert not made(fails).applied(e, byte_tokenizer()).counted.any()


def test_functions_of_one_name_keep_their_modules_in_figures():
    def form(prompts, answers):
        return [1.0] * len(answers)

    one, other = RewardFunction.of("a:form", form), RewardFunction.of("b:form", form)
    assert Rewards(functions=(one, other)).names == ["a:form", "b:form"]


def test_what_only_watches_scores_nothing():
    """Neither a function nor a reward model of weight 0 makes an answer count."""

    def watches(prompts, answers):
        return [1.0] * len(answers)

    def decides(prompts, answers):
        return [None, 2.0]

    assert applied(made(watches, decides, weights=(0.0, 1.0))).counted.tolist() == [
        *(False, True, False)
    ]
    e = made(decides).applied(sampled(), byte_tokenizer())  # the reward model's score counts
    assert e.counted.tolist() == [True, True, False] and e.rewards[:2].tolist() == [3.0, 1.0]


def group_of(values: list[float | None], **changes) -> tuple[Experience, PPOConfig]:
    """Answers of 4 tokens to one prompt with these rewards, and their advantages."""
    e = sampled().rows(torch.zeros(len(values), dtype=torch.long))
    scored = torch.tensor([value is not None for value in values])
    rewards = torch.tensor([value or 0.0 for value in values])
    e = dataclasses.replace(e, group=torch.zeros_like(e.group), rewards=rewards, scored=scored)
    config = PPOConfig.of(answers_per_prompt=2, **changes)
    (learned,) = with_advantages([e], config, kl_coef=0.0)
    return learned, config


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_a_group_is_compared_as_if_it_had_the_scored_answers_alone(estimator):
    with_none, _ = group_of([1.0, None, 4.0, None, 7.0], advantage_estimator=estimator)
    alone, _ = group_of([1.0, 4.0, 7.0], advantage_estimator=estimator)
    found = filled(with_none.advantages)[[0, 2, 4]]
    torch.testing.assert_close(found, filled(alone.advantages), rtol=0, atol=0)
    assert with_none.loss_mask.any(1).tolist() == [True, False, True, False, True]
    assert filled(with_none.advantages)[[1, 3]].eq(0).all()


def test_one_score_in_a_group_is_compared_with_nothing():
    e, _ = group_of([None, 4.0, None], advantage_estimator="rloo")
    assert filled(e.advantages).eq(0).all() and e.loss_mask.any(1).tolist() == [False, True, False]


def test_statistics_are_those_of_the_scored_answers():
    with_none, _ = group_of([1.0, None, 4.0], advantage_estimator="gae")
    alone, config = group_of([1.0, 4.0], advantage_estimator="gae")
    assert config.whitens
    one, other = (whitened([e])[0] for e in (with_none, alone))
    torch.testing.assert_close(one.advantages[[0, 2]], other.advantages, rtol=0, atol=0)
    assert rollout_statistics([with_none])["reward"] == 2.5
    assert zero_spread([with_none], 0.0) == 0.0


def test_without_any_score_there_are_no_figures_and_nothing_is_learnt():
    def nothing(prompts, answers):
        return [None] * len(answers)

    rewards = made(nothing)
    e = applied(rewards)
    assert rewards.statistics([e]) == {"unscored": 1.0}
    assert "reward" not in rollout_statistics([e]) and zero_spread([e], 0.0) == 0.0
    (learned,) = with_advantages([e], PPOConfig(), kl_coef=0.1)
    assert not learned.loss_mask.any()


def test_columns_that_no_function_can_take():
    kept = KeptColumns(everything=True, reserved=("answers",), asked_by="reward_function m:f")
    with pytest.raises(UserError, match="column 'answers': reward_function m:f has an argument"):
        kept.of({"answers": ["a"]})
    with pytest.raises(UserError, match="column 'when' is of type bytes: reward_function m:f can"):
        kept.of({"when": b"x"})
    with pytest.raises(UserError, match=r"no column 'answer', which m:g takes \(columns: q\)"):
        KeptColumns(needed=("answer",), asked_by="m:g").of({"q": 1})
