"""Rewards from a model, from the user's function, or from both."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dschat.errors import UserError
from dschat.models.reward_statistics import RewardStatistics
from dschat.rlhf import rewards
from dschat.rlhf.part_config import RewardConfig
from dschat.rlhf.reward_functions import RewardFunction
from dschat.rlhf.rewards import Rewards, texts_of
from tests.helpers.rounding import NEAR_ONE
from tests.helpers.tiny import byte_tokenizer
from tests.rlhf.hand_made import sampled
from tests.rlhf.tiny_roles import LORA, Setting, end_after, ppo_trainer, prompts

OWN = """
import math

def length(prompt, answer):
    return len(answer)

def with_options(prompt, answer, scale=2.0):
    return scale

def fails(prompt, answer):
    return {}[answer]

def gives_nan(prompt, answer):
    return math.nan

def gives_text(prompt, answer):
    return "good"

def gives_too_much(prompt, answer):
    return 10**400

def one_text(answer):
    return 0.0
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of functions in the current folder."""
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "own_rewards.py"
    sys.modules.pop("own_rewards", None)


def test_texts_are_those_between_beginning_and_end():
    tokenizer = byte_tokenizer()
    texts = [texts_of(sampled(), row, tokenizer) for row in range(2)]
    assert texts == [("q: b", "yes"), ("q", "no!!")]


def test_parts_and_sum_by_hand():
    called = []

    def function(prompt: str, answer: str) -> float:
        called.append((prompt, answer))
        return {"yes": 1, "no!!": 0.5}[answer]

    rewards = Rewards(
        RewardConfig(("m:f",), reward_function_weight=(10.0,), reward_model_weight=0.5),
        (RewardFunction("m:f", function, "digest"),),
        RewardStatistics(mean=1.0, std=2.0, count=2, data="rows"),
    )
    e = rewards.applied(sampled(), byte_tokenizer())
    assert called == [("q: b", "yes"), ("q", "no!!")]  # filler is not asked for
    assert e.model_scores.tolist() == [3.0, -1.0, 50.0]
    assert e.function_scores.tolist() == [[1.0], [0.5], [0.0]]
    # 0.5 * (3 - 1) / 2 + 10 * 1 and 0.5 * (-1 - 1) / 2 + 10 * 0.5
    assert e.rewards[:2].tolist() == [10.5, 4.5]
    assert rewards.statistics([e, e]) == {
        "reward_std": 3.0,
        "reward_clipped": 0.0,
        "reward_model": 1.0,
        "reward_function": 0.75,
        "rewards/f": 0.75,
        "unscored": 0.0,
    }


def test_the_clip_is_for_the_models_scaled_score_alone():
    rewards = Rewards(
        RewardConfig(("m:f",), reward_model_weight=10.0, reward_clip=0.75),
        (RewardFunction("m:f", lambda prompt, answer: 70.0, "digest"),),
        RewardStatistics(mean=2.0, std=2.0, count=2, data="rows"),
    )
    e = rewards.applied(sampled(), byte_tokenizer())
    # (3 - 2) / 2 is within, (-1 - 2) / 2 is not.
    assert e.rewards[:2].tolist() == [10 * 0.5 + 70, 10 * -0.75 + 70]
    assert rewards.statistics([e])["reward_clipped"] == 0.5
    watched = replace(rewards, config=replace(rewards.config, reward_model_weight=0.0))
    assert "reward_clipped" not in watched.statistics([watched.applied(e, byte_tokenizer())])
    alone = Rewards(functions=rewards.functions)
    e = alone.applied(replace(sampled(), model_scores=None), byte_tokenizer())
    assert e.rewards[:2].tolist() == [70.0, 70.0] and "reward_clipped" not in alone.statistics([e])


def test_without_function_and_scaling_nothing_changes():
    e = Rewards(RewardConfig(reward_clip=51.0)).applied(sampled(), byte_tokenizer())
    assert torch.equal(e.rewards, sampled().model_scores)
    assert "reward_function" not in Rewards().statistics([e])


def test_without_a_model_the_function_is_all():
    rewards = Rewards(functions=(RewardFunction("m:f", lambda prompt, answer: len(answer)),))
    e = rewards.applied(replace(sampled(), model_scores=None), byte_tokenizer())
    assert e.rewards[:2].tolist() == [3.0, 4.0] and e.model_scores is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_rewards", "reward_function own_rewards: give module:name"),
        ("no_such_module:f", "no_such_module does not import (ModuleNotFoundError: No module"),
        ("own_rewards:nothing", "own_rewards has no function 'nothing'"),
        ("own_rewards:math", "own_rewards has no function 'math'"),
        ("own_rewards:one_text", "it is called as one_text(prompt, answer), which does not fit"),
    ],
)
def test_what_is_no_reward_function_is_refused_at_once(own, name, words):
    with pytest.raises(UserError) as caught:
        Rewards.load(RewardConfig(reward_function=(name,)), None)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", "fails (KeyError: 'yes') for the prompt 'q: b' and the answer 'yes'"),
        ("gives_nan", "returned nan for the prompt 'q: b' and the answer 'yes': return a finite"),
        ("gives_text", "returned 'good' for the prompt"),
        ("gives_too_much", "for the prompt 'q: b' and the answer 'yes': return a finite number"),
    ],
)
def test_what_a_function_gets_wrong_is_named_with_its_row(own, name, words):
    function = RewardFunction.load(f"own_rewards:{name}")
    with pytest.raises(UserError) as caught:
        Rewards(functions=(function,)).applied(sampled(), byte_tokenizer())
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_fails_on_another_rank_stops_this_one(own, monkeypatch):
    def agreed(work):
        work()
        raise UserError("another rank's")

    monkeypatch.setattr(rewards, "on_every_rank", agreed)
    with pytest.raises(UserError, match="another rank's"):
        function = RewardFunction.load("own_rewards:length")
        Rewards(functions=(function,)).applied(sampled(), byte_tokenizer())


def test_parameters_with_defaults_do_no_harm(own):
    assert RewardFunction.load("own_rewards:with_options").scores(["p"], ["a"]) == [2.0]


def test_an_edited_function_is_another(own):
    config = RewardConfig(reward_function=("own_rewards:length",))
    before = Rewards.load(config, None).record()
    own.write_text(OWN.replace("len(answer)", "-len(answer)"))
    sys.modules.pop("own_rewards")
    after = Rewards.load(config, None).record()
    assert before.keys() == after.keys() == {"reward_function.source"} and before != after


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"reward_function_weight": (2.0,)}, "there is no function"),
        ({"reward_model_weight": 0.0}, "nothing is rewarded"),
        ({"reward_model_weight": float("nan")}, "reward_model_weight is nan"),
        (
            {
                "reward_function": ("m:f",),
                "reward_function_weight": (0.0,),
                "reward_model_weight": 0.0,
            },
            "nothing is rewarded",
        ),
    ],
)
def test_weights_that_make_no_reward_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        RewardConfig(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"reward_model_weight": 0.5}, "reward_model_weight is 0.5, and there is no reward model"),
        (
            {"reward_function_weight": (0.0,)},
            "reward_function_weight is 0, and there is no reward mo",
        ),
    ],
)
def test_weights_of_a_function_alone(own, given, words):
    config = RewardConfig(reward_function=("own_rewards:length",), **given)
    with pytest.raises(UserError, match=words):
        Rewards.load(config, None)
    config = RewardConfig(reward_function=("own_rewards:length",))
    assert Rewards.load(config, None).scaling is None


def test_an_iteration_learns_from_both(load_roles, own):
    """The same rollout with and without a function differs by the function's part."""
    setting = Setting(lora=LORA)
    trainer = ppo_trainer(load_roles(setting), setting)

    def figures(rewards: Rewards) -> dict[str, float]:
        torch.manual_seed(0)
        trainer.rewards = rewards
        hook = end_after(trainer.roles.actor.module, [2, 6, 1, None])
        experiences = trainer.rollout([prompts()])
        hook.remove()
        return trainer.earned(experiences)

    alone = figures(Rewards())
    function = RewardFunction("m:f", lambda prompt, answer: 1.0 if prompt else -1.0)
    config = RewardConfig(reward_function=("m:f",), reward_function_weight=(0.5,))
    both = figures(Rewards(config, (function,)))
    assert both["reward_function"] == 1.0
    assert both["reward_model"] == alone["reward_model"] == pytest.approx(alone["reward"])
    assert both["reward"] == pytest.approx(alone["reward"] + 0.5, abs=NEAR_ONE)
