import pytest

from dschat.rlhf.advantages import KLController
from dschat.rlhf.ppo_config import PPOConfig
from tests.helpers.rounding import FIGURE


def controller(kl_coef: float, kl_target: float | None = None, kl_horizon: int = 10_000):
    return KLController(PPOConfig(kl_coef=kl_coef, kl_target=kl_target, kl_horizon=kl_horizon))


def test_a_fixed_coefficient_stays():
    kl = controller(0.1)
    kl.update(1e6, 1e6)
    assert kl.coefficient == 0.1


@pytest.mark.parametrize(
    "measured, answers, expected",
    [
        (6.6, 256, 0.3 * (1 + 0.1 * 256 / 1024)),  # a tenth above the target of 6
        (5.4, 256, 0.3 * (1 - 0.1 * 256 / 1024)),
        (6.0, 256, 0.3),
        (60.0, 256, 0.3 * (1 + 0.2 * 256 / 1024)),  # errors count up to a fifth
        (-2.0, 256, 0.3 * (1 - 0.2 * 256 / 1024)),  # k1 of a sample may be negative
        (60.0, 10_000, 0.3 * 1.2),  # more answers than the horizon count as one horizon
        (0.0, 10_000, 0.3 * 0.8),
    ],
)
def test_one_iteration_by_hand(measured, answers, expected):
    kl = controller(0.3, 6.0, 1024)
    kl.update(measured, answers)
    assert kl.coefficient == pytest.approx(expected, rel=FIGURE)


def test_it_finds_the_coefficient_of_its_target():
    """A policy whose KL is 2 / beta meets a target of 8 at beta = 1/4, from either side."""
    for start in (0.01, 4.0):
        kl = controller(start, 8.0, 100)
        for _ in range(200):
            kl.update(2.0 / kl.coefficient, 64)
        assert kl.coefficient == pytest.approx(0.25, rel=FIGURE)


def test_it_goes_on_where_it_stood():
    kl, other = (controller(0.3, 6.0, 100) for _ in range(2))
    kl.update(9.0, 64)
    other.load_state_dict(kl.state_dict())
    for each in (kl, other):
        each.update(7.0, 64)
    assert kl.coefficient == other.coefficient != 0.3
