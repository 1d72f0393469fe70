"""Warnings of a PPO run, from histories made up to trigger them and not to."""

import math
import random
from collections.abc import Mapping

import pytest
import torch

from benchmarks.ppo_monitor import (
    BEGINNING,
    NOT_FINITE,
    TROUBLES,
    WHILE,
    Trouble,
    history,
    said,
)
from dschat.errors import UserError
from dschat.rlhf.ppo_health import REPEATED_AFTER, HealthMonitor
from dschat.rlhf.ppo_history import WATCHED, History
from dschat.rlhf.ppo_rules import RULES, RunFacts
from dschat.rlhf.ppo_series import LONG, REMEMBERED, SHORT
from dschat.rlhf.ppo_updates import Updates
from tests.rlhf.tiny_roles import Setting, assert_same, ppo_trainer, rollout, weights

HEALTHY = {
    "reward": 0.5,
    "reward_error": 0.125,
    "reward_std": 1.0,
    "reward_clipped": 0.02,
    "answers": 64.0,
    "answer_length": 40.0,
    "answer_length_error": 1.25,
    "ended": 0.9,
    "kl_per_token": 0.05,
    "kl_k3": 0.05,
    "ref_nats_per_token": 1.5,
    "decode_gap": 1e-6,
    "frac_reward_zero_std": 0.1,
    "entropy": 1.4,
    "clip_fraction": 0.1,
    "explained_variance": 0.4,
    "unscored": 0.0,
    "masked": 0.0,
    "actor_skipped_steps": 0.0,
}
# Iterations from the beginning of a trouble to its warning: at most three of most. A fall of the
# reward has to come out of chance first; lengths may do so a little later than on average.
SOON = {
    "reward falls": 10,  # four standard errors of a slope of 0.1 come at the 6th
    "blind critic": REMEMBERED,
    "constant critic": REMEMBERED,
    "critic goes blind": WHILE + LONG - 1,
    "collapse after a gain": 20,  # entropy is below a tenth from the 19th on
}
RULE = {rule.name: rule for rule in RULES}


@pytest.mark.parametrize("name", TROUBLES)
def test_each_trouble_is_named_first_and_soon_and_nothing_beside_it(name):
    trouble = TROUBLES[name]
    for seed in range(5):
        found = said(history(trouble, random.Random(seed)))
        if trouble.rule is None:
            assert found == []
            continue
        at, rule = found[0]
        assert rule == trouble.rule
        assert at - BEGINNING < (1 if rule == NOT_FINITE else SOON.get(name, LONG))
        assert {rule for _, rule in found} == {trouble.rule}


# Other paces and numbers of answers; the most iterations that all of 8 histories take.
PACES = {
    "drifts 0.15": ("ran away", lambda t: {"kl_per_token": 0.15 * t, "reward": 0.0}, 128, 3),
    "drifts 0.3": ("ran away", lambda t: {"kl_per_token": 0.3 * t, "reward": -0.1 * t}, 32, 3),
    "shrinks by 15": ("answers shrank", lambda t: {"answer_length": max(100 - 15 * t, 1)}, 64, 3),
    "grows by 25": (
        "answers grew",
        lambda t: {"answer_length": 100 + 25 * min(t, 6), "ended": max(0.9 - 0.1 * t, 0.2)},
        64,
        3,
    ),
    "gamed 0.4": ("gamed reward", lambda t: {"kl_per_token": 0.4 * t, "reward": 0.6 * t}, 64, 3),
    "still": ("standstill", lambda t: {"kl_k3": 1e-7, "kl_per_token": 0.0, "reward": 0.0}, 32, 3),
    "no gradient": (
        "standstill",
        lambda t: {"kl_k3": 0.0, "kl_per_token": 0.0, "reward": 0.0},
        8,
        2,
    ),
    "falls by 0.5": ("reward fell", lambda t: {"reward": -0.5 * t}, 64, 3),
    "falls by 0.2, many answers": ("reward fell", lambda t: {"reward": -0.2 * t}, 1024, 3),
    "falls by 0.1, many answers": ("reward fell", lambda t: {"reward": -0.1 * t}, 1024, 3),
    "falls by 0.35": ("reward fell", lambda t: {"reward": -0.35 * t}, 64, 4),
}
# What good runs do.
GOOD = {
    "fast": lambda t: {"kl_per_token": 0.4 * (1 - 0.7**t), "reward": 3 * (1 - 0.7**t)},
    "flat": lambda t: {"reward": 0.0},
    "shorter": lambda t: {"answer_length": 70 + 30 * 0.85**t},
    "longer": lambda t: {"answer_length": 150 - 50 * 0.8**t, "ended": 0.8 + 0.1 * 0.8**t},
    "learns to end": lambda t: {"answer_length": 50 + 50 * 0.7**t, "ended": 1 - 0.5 * 0.7**t},
}


@pytest.mark.parametrize("name", PACES)
def test_other_paces_are_seen_as_soon(name):
    rule, change, answers, most = PACES[name]
    for seed in range(8):
        found = said(history(Trouble(rule, change), random.Random(seed), answers))
        assert found[0][1] == rule and found[0][0] - BEGINNING < most


@pytest.mark.parametrize("answers", [16, 64, 256])
@pytest.mark.parametrize("name", GOOD)
def test_what_good_runs_do_is_not_warned_of(name, answers):
    good = Trouble(None, GOOD[name], from_the_start=True)
    for seed in range(4):
        assert said(history(good, random.Random(seed), answers)) == []


def test_every_rule_has_a_history():
    assert {trouble.rule for trouble in TROUBLES.values()} - {None, NOT_FINITE} == RULE.keys()
    assert HEALTHY.keys() == set(WATCHED)
    for rule in RULES:
        assert set(rule.explains) < RULE.keys() - {rule.name}


def seen(*changes: Mapping[str, float]) -> set[str]:
    """Causes after a healthy first iteration and one for each of `changes`."""
    past = History()
    for change in ({}, *changes):
        past.add(HEALTHY | change)
    found = {rule.name for rule in RULES if rule.is_seen(past)}
    return found - {effect for name in found for effect in RULE[name].explains}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"kl_per_token": 0.45}, None),
        ({"kl_per_token": 0.6, "reward": 0.9}, "ran away"),
        ({"kl_per_token": 0.6, "reward": 1.1}, "gamed reward"),
        ({"kl_per_token": 2.1, "reward": 5.0}, "ran away"),  # at once
        ({"ref_nats_per_token": 2.1, "reward": 1.1}, "gamed reward"),
        ({"ref_nats_per_token": 2.1}, None),  # unlikely, but nothing is gained
        ({"reward": 2.0}, None),  # for the better
        ({"reward": -0.05}, None),  # four standard errors are 0.58
        ({"reward": -0.1}, "reward fell"),
        ({"kl_per_token": -0.011}, None),  # chance: 7,680 tokens with a variance of 0.1
        ({"kl_per_token": -0.02}, "negative KL"),
        ({"answer_length": 14.0}, None),
        ({"answer_length": 13.0}, "answers shrank"),
        ({"answer_length": 79.0}, None),
        ({"answer_length": 81.0}, "answers grew"),
        ({"ended": 0.4}, None),
        ({"ended": 0.4, "answer_length": 49.0}, "answers grew"),
        ({"ended": 0.0}, "no ends"),
        ({"clip_fraction": 0.25}, None),
        ({"clip_fraction": 0.35}, "long updates"),
        ({"entropy": 0.15}, None),
        ({"entropy": 0.13}, "entropy collapse"),
        ({"entropy": 0.13, "reward": 0.95}, "entropy collapse"),
        ({"entropy": 0.01, "reward": 1.1}, None),  # half a spread was gained by it
        ({"explained_variance": 0.0}, None),
        ({"reward_std": 1e-3}, None),
        ({"reward_std": 0.0}, "equal rewards"),
        ({"reward_clipped": 0.09}, None),
        ({"reward_clipped": 0.11}, "clipped rewards"),
        ({"decode_gap": 0.05}, None),  # three times what bf16 makes
        ({"decode_gap": 0.2}, "foreign answers"),
    ],
)
def test_thresholds(change, rule):
    assert seen(*LONG * [change]) == ({rule} if rule else set())
    assert seen(*SHORT * [change], {}) == set()  # what is interrupted does not last


def test_a_jump_away_is_no_gain_of_the_reward():
    """Seen in a run at a rate of 3e-2: answers of chance, one of whose mean rewards was high."""
    jumped = {"kl_per_token": 6.3, "kl_k3": 5.7, "ref_nats_per_token": 8.7, "reward": 1.1}
    assert said([HEALTHY, HEALTHY, HEALTHY | jumped]) == [(3, "ran away")]


@pytest.mark.parametrize(("tokens", "warned"), [(8.0, False), (9.0, True)])
def test_a_few_words_may_be_learnt_at_any_price(tokens, warned):
    """At 0.6 nats a token, 5 nats an answer come with its ninth."""
    short = HEALTHY | {"answer_length": tokens}
    assert bool(said([short, *LONG * [short | {"kl_per_token": 0.6}]])) == warned


def still(kl: float) -> list[dict[str, float]]:
    return 30 * [HEALTHY | {"kl_per_token": kl, "kl_k3": kl}]


def first_warned(figures: list[dict[str, float]], slow_start: float, updates: int = 1) -> int:
    monitor = HealthMonitor(None, slow_start, updates)
    return next((i for i, each in enumerate(figures, 1) if monitor.observe(i, each)), 0)


# After n full iterations a standstill is below 2.5e-7 n^2, and shown by two of them at least.
@pytest.mark.parametrize(
    ("kl", "slow_start", "updates", "warned"),
    [
        (1e-3, 0, 1, 0),
        (1.1e-6, 0, 1, 4),  # of 2.25e-6 after 3, 1e-6 after 2
        (2e-12, 0, 1, 3),  # rounding alone: no step has moved anything
        (2e-12, 0.5, 2, 3),  # a warm-up of one step, whose rate is 0: 1.5 iterations of steps
        (2e-12, 1, 1, 3),  # one iteration
        (0.0, 10, 1, 3),  # 0 + 1/10
        (2e-12, 10, 4, 3),  # 2e-12 < 2.5e-7 (28/40/4)^2: 0, 1/40 .. 7/40
        (1e-6, 15, 1, 10),  # of 1.44e-6 after (1 + .. + 8)/15 = 2.4; before it 1.87^2
    ],
)
def test_a_standstill_is_seen_by_the_steps_rates(kl, slow_start, updates, warned):
    assert first_warned(still(kl), slow_start, updates) == warned


def test_the_rewards_of_a_policy_that_does_not_move_do_not_fall():
    """Of 200 made-up standstills of 40 iterations one was said to fall, by chance."""
    falls = [old | {"reward": 0.5 - 0.2 * i} for i, old in enumerate(still(0.0)[:10])]
    assert "reward fell" not in {rule for _, rule in said(falls)}
    moves = [figures | {"kl_k3": 1e-3} for figures in falls]
    assert "reward fell" in {rule for _, rule in said(moves)}


def test_steps_that_fp16_skips_are_no_standstill():
    """The search for a loss scale skips the first steps: here eight of two an iteration."""
    skipped = [{"actor_skipped_steps": min(2.0 * i, 8.0)} for i in range(1, 31)]
    figures = [old | new for old, new in zip(still(0.0), skipped, strict=True)]
    assert first_warned(figures, 0, 2) == 6  # whose fifth iteration made steps


def test_a_standstill_after_the_critics_warm_up_is_that_of_the_actors_iterations():
    rests = {name: x for name, x in (HEALTHY | {"kl_k3": 0.0}).items() if name != "entropy"}
    assert first_warned([*5 * [rests], *still(0.0)], 0) == 5 + 1 + SHORT


def test_figures_that_are_not_there_are_not_judged():
    """RLOO has no critic; while the critic warms up there is no entropy."""
    lean = {n: HEALTHY[n] for n in ("reward", "reward_std", "kl_per_token", "answer_length")}
    assert said(40 * [lean]) == []
    entropy = [*3 * [lean], *SHORT * [HEALTHY], *SHORT * [HEALTHY | {"entropy": 0.1}]]
    assert said(entropy) == [(len(entropy), "entropy collapse")]


def test_what_follows_is_not_said_even_when_its_cause_was_said_before():
    away = {"kl_per_token": 9.0, "reward": -1.0}
    later = {"kl_per_token": 0.4, "ended": 0.0, "entropy": 0.1, "explained_variance": -1.0}
    figures = [HEALTHY | change for change in ({}, away, away, *20 * [later])]
    assert said(figures) == [(2, "ran away")]


def test_low_entropy_is_no_collapse_while_the_reward_is_at_its_best():
    """What is right leaves little to choose from; what was gained and lost again is another."""
    gained = 20 * [HEALTHY | {"entropy": 0.1, "reward": 1.6}]
    assert said([HEALTHY, *gained, *10 * [HEALTHY | {"entropy": 0.1, "reward": 1.2}]]) == []
    lost = 10 * [HEALTHY | {"entropy": 0.1, "reward": 0.95}]  # 0.65 spreads, four errors are 0.58
    assert said([HEALTHY, *gained, *lost]) == [(24, "entropy collapse")]


def test_causes_of_their_own_are_both_said():
    both = HEALTHY | {"reward_clipped": 0.3, "ended": 0.0}
    assert said([HEALTHY, both, both]) == [(3, "clipped rewards"), (3, "no ends")]


def test_each_is_said_once_in_a_while():
    figures = 120 * [HEALTHY | {"reward_clipped": 0.3}]
    assert [at for at, _ in said(figures)] == [2, 2 + REPEATED_AFTER, 2 + 2 * REPEATED_AFTER]


def test_answers_that_never_ended_are_no_trouble_of_the_run():
    """Said once, at the first iteration (test_ppo_log.py)."""
    assert said(40 * [HEALTHY | {"ended": 0.0}]) == []


def test_a_resumed_monitor_goes_on_as_the_first():
    one, other = HealthMonitor(), HealthMonitor()
    for i in range(1, 8):
        one.observe(i, HEALTHY | {"ended": 0.0})
    other.load_state_dict(one.state_dict())
    for i in range(8, 70):
        figures = HEALTHY | {"ended": 0.0, "clip_fraction": i / 70}
        assert one.observe(i, figures) == other.observe(i, figures)
    assert one.state_dict() == other.state_dict()


def text(rule: str, facts: RunFacts, **change: float) -> str:
    past = History()
    for each in ({}, *LONG * [change]):
        past.add(HEALTHY | each)
    warning = RULE[rule].warning(past, facts)
    assert warning is not None
    return warning


def test_numbers_and_remedies_of_the_run():
    lora = RunFacts(rate="actor_lora_learning_rate", ppo_epochs=4)
    assert text("ran away", lora, kl_per_token=9.0, reward=-2.5) == (
        "the policy has left the reference (9 nats a token) and not for the reward, 0.5 at first "
        "and -2.5 now: its updates are too long; lower actor_lora_learning_rate or ppo_epochs, or "
        "raise kl_coef"
    )
    gamed = text("gamed reward", RunFacts(has_kl_target=True), kl_per_token=1.0, reward=3.0)
    assert gamed.endswith("read the answers (print_answers), lower kl_target or stop earlier")
    left = text("gamed reward", RunFacts(), reward=3.0, ref_nats_per_token=2.25)
    assert "(KL 0.05 nats a token; its answers have 2.2 there, 1.5 at first)" in left
    clipped = {"reward_clipped": 0.4}
    assert text("clipped rewards", RunFacts(), **clipped).endswith("equal; raise it")
    scaled = text("clipped rewards", RunFacts(can_scale=True), **clipped)
    assert scaled.endswith("give reward_scaling auto, or raise reward_clip")
    scaled = text("clipped rewards", RunFacts(is_scaled=True), **clipped)
    assert scaled.endswith(
        "equal; raise it, or train step 2 longer, the spread of whose scores is their unit"
    )
    own = RunFacts(has_reward_model=False, has_reward_function=True)
    assert text("equal rewards", own, reward_std=0.0).endswith("learn from; check reward_function")
    assert text("masked answers", own, masked=0.95).endswith(
        "; raise max_answer_seq_len, or drop mask_truncated_answers"
    )
    assert "raise max_answer_seq_len where step 2's answers are longer, or" in text(
        "masked answers", RunFacts(), masked=0.95
    )
    filtered = RunFacts(filters=("top_p", "top_k"))
    assert text("negative KL", filtered, kl_per_token=-0.1).endswith("; drop top_p, top_k")
    fused = RunFacts(fuses_adapters=True)
    assert text("foreign answers", fused, decode_gap=0.2).endswith("fuse_lora_for_generation")


def test_weights_that_are_not_finite_end_the_iteration(load_roles):
    """A loss may be finite, its gradient not; DeepSpeed measures no norm without ZeRO in fp32."""
    setting = Setting()
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting)
    e = rollout(trainer)
    next(roles.actor.module.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match=r"^step 1: weights of the actor are not finite"):
        trainer.train_rlhf([e])


@pytest.mark.parametrize("place", ["reward", "actor", "critic"])
def test_what_is_not_finite_stops_before_it_changes_anything(load_roles, monkeypatch, place):
    setting = Setting()
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting)
    before = weights(roles.actor.module)
    if place == "reward":
        for parameter in roles.reward.parameters():
            parameter.data.fill_(float("nan"))
    else:
        inner = getattr(Updates, f"{place}_loss")

        def broken(*args):
            loss, sums = inner(*args)
            return loss * float("nan"), {n: x * float("nan") for n, x in sums.items()}

        monkeypatch.setattr(Updates, f"{place}_loss", broken)
    figure = {"reward": "reward", "actor": "actor_loss", "critic": "critic_loss"}[place]
    at = "" if place == "reward" else r" on rank 0, and the gradient of \S+ on rank 0 is not finite"
    with pytest.raises(UserError, match=f"^{figure} of iteration 1 is nan{at}: the run stops"):
        trainer.train_rlhf([rollout(trainer)])
    assert_same(before, weights(roles.actor.module), 0.0)  # whose step is the second
    assert all(torch.isfinite(p).all() for p in roles.critic.module.parameters())
