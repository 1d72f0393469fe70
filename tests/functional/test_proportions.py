"""Intervals of shares and calibration, by numbers worked by hand."""

import math

import pytest
import torch

from dschat.functional.proportions import calibration_error, reliability, wilson_interval
from tests.helpers.rounding import FIGURE, NEAR_ONE


def test_wilsons_interval():
    # 8 of 10, z = 2: centre (0.8 + 0.2) / 1.4
    half = 2 * math.sqrt(0.016 + 0.01) / 1.4
    low, high = wilson_interval(8, 10, z=2.0)
    assert (low, high) == pytest.approx((1 / 1.4 - half, 1 / 1.4 + half), rel=FIGURE)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    # 0 of 4: from 0 to z^2 / (4 + z^2); it never leaves [0, 1]
    assert wilson_interval(0, 4, z=2.0) == pytest.approx((0.0, 0.5))
    assert wilson_interval(4, 4, z=2.0) == pytest.approx((0.5, 1.0))


def test_reliability_and_its_error():
    confidence = torch.tensor([0.51, 0.53, 0.92, 0.94, 1.0])
    right = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0])
    bins = reliability(confidence, right, bins=10)
    found = [(b.low, b.high, b.count) for b in bins]
    assert found == [(0.5, 0.55, 2), (0.9, 0.95, 2), (0.95, 1.0, 1)]
    assert [b.confidence for b in bins] == pytest.approx([0.52, 0.93, 1.0])
    assert [b.accuracy for b in bins] == pytest.approx([0.5, 0.75, 1.0])
    # (2 * 0.02 + 2 * 0.18 + 1 * 0) / 5
    assert calibration_error(bins) == pytest.approx(0.08, abs=NEAR_ONE)
