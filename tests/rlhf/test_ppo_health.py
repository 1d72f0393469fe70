"""Warnings of a PPO run, from histories made up to trigger them and not to."""

from collections.abc import Mapping, Sequence

import pytest

from dschat.rlhf.ppo_health import (
    FIRST,
    LONG,
    REPEATED_AFTER,
    RULES,
    SHORT,
    WATCHED,
    HealthMonitor,
    History,
    likely_causes,
)

HEALTHY = {
    "reward": 0.5,
    "reward_std": 1.0,
    "reward_clipped": 0.02,
    "kl_per_token": 0.05,
    "ref_nats_per_token": 1.5,
    "ended": 0.9,
    "answer_length": 40.0,
    "clip_fraction": 0.1,
    "explained_variance": 0.4,
    "entropy": 1.4,
}


def observed(*changes: Mapping[str, float]) -> History:
    """A run of healthy first iterations, then one for each of `changes`."""
    monitor = HealthMonitor()
    for number, change in enumerate([*FIRST * [{}], *changes], 1):
        monitor.observe(number, HEALTHY | change)
    return History(monitor.first, monitor.recent)


def test_a_healthy_run_has_no_warnings():
    assert set(HEALTHY) == set(WATCHED)
    assert likely_causes(observed(*LONG * [{}])) == {}
    assert likely_causes(History({}, [])) == {}


ILL: dict[str, tuple[int, Mapping[str, float], Sequence[str]]] = {
    "negative KL": (LONG, {"kl_per_token": -0.02}, ["mean -0.020", "temperature 1, top_p 1"]),
    "over-optimisation": (
        SHORT,
        {"reward": 2.0, "ref_nats_per_token": 2.5},
        ["from 0.5 to 2 ", "(1.50 to 2.50 nats per token)", "raise kl_coef"],
    ),
    "no ends": (SHORT, {"ended": 0.0}, ["0.0% of the answers", "length 40", "max_answer_seq_len"]),
    "high clip fraction": (SHORT, {"clip_fraction": 0.4}, ["40% of", "actor_learning_rate"]),
    "blind critic": (LONG, {"explained_variance": -0.2}, ["mean -0.20", "critic_learning_rate"]),
    "equal rewards": (SHORT, {"reward_std": 0.0}, ["the reward 0.5:", "reward_function"]),
    "clipped rewards": (SHORT, {"reward_clipped": 0.8}, ["80% of the rewards", "reward_clip"]),
    "entropy collapse": (SHORT, {"entropy": 0.1}, ["from 1.4 to 0.1 nats", "kl_coef"]),
}


@pytest.mark.parametrize("kind", RULES)
def test_what_lasts_is_named_with_numbers_and_a_remedy(kind):
    length, change, words = ILL[kind]
    found = likely_causes(observed(*length * [change]))
    assert found.keys() == {kind}
    assert all(word in found[kind] for word in words), found[kind]


@pytest.mark.parametrize("kind", RULES)
def test_a_single_iteration_is_no_reason(kind):
    _, change, _ = ILL[kind]
    for healthy in range(LONG):
        assert likely_causes(observed(*healthy * [{}], change)) == {}


@pytest.mark.parametrize("kind", ["negative KL", "blind critic", "equal rewards"])
def test_what_is_interrupted_does_not_last(kind):
    length, change, _ = ILL[kind]
    assert likely_causes(observed(*(length - 1) * [change], {}, change)) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"kl_per_token": -0.005},  # noise around 0
        {"reward": 2.0},  # for the better
        {"ref_nats_per_token": 2.5},  # unlikely, but nothing is gained
        {"reward": 0.6, "ref_nats_per_token": 2.5},  # nor here
        {"ended": 0.05},
        {"clip_fraction": 0.25},
        {"explained_variance": 0.0},
        {"reward_std": 1e-3},
        {"entropy": 0.3},
    ],
)
def test_what_is_not_bad_enough(change):
    assert likely_causes(observed(*LONG * [change])) == {}


def test_a_run_without_a_critic_has_no_blind_one():
    figures = {name: value for name, value in HEALTHY.items() if name != "explained_variance"}
    first = {name: FIRST * [value] for name, value in figures.items()}
    assert likely_causes(History(first, LONG * [figures])) == {}


def test_the_start_of_a_figure_is_where_it_is_first_seen():
    """While the critic warms up there is no entropy."""
    monitor = HealthMonitor()
    warm_up = {name: value for name, value in HEALTHY.items() if name != "entropy"}
    figures = [*3 * [warm_up], *FIRST * [HEALTHY], *SHORT * [HEALTHY | {"entropy": 0.1}]]
    said = [monitor.observe(number, each) for number, each in enumerate(figures, 1)]
    assert "from 1.4 to 0.1 nats" in said[-1][0] and not any(said[:-1])


def test_each_is_said_once_in_a_while():
    monitor = HealthMonitor()
    said = [bool(monitor.observe(i, HEALTHY | {"ended": 0.0})) for i in range(1, 120)]
    at = [number for number, is_said in enumerate(said, 1) if is_said]
    assert at == [SHORT, SHORT + REPEATED_AFTER, SHORT + 2 * REPEATED_AFTER]


def test_a_resumed_monitor_goes_on_as_the_first():
    one, other = HealthMonitor(), HealthMonitor()
    for i in range(1, 8):
        one.observe(i, HEALTHY | {"ended": 0.0})
    other.load_state_dict(one.state_dict())
    for i in range(8, 70):
        figures = HEALTHY | {"ended": 0.0, "clip_fraction": i / 70}
        assert one.observe(i, figures) == other.observe(i, figures)
    assert one.state_dict() == other.state_dict()
