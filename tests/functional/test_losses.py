import math

import pytest
import torch

from dschat.functional.losses import (
    kl_loss,
    mean_scale,
    pairwise_loss,
    policy_loss,
    token_entropy,
    token_logprobs,
    token_ratio,
    value_loss,
)
from tests.helpers.rounding import DIFFERENT, NEAR_ONE, ROUNDING

LOG2, LOG3 = math.log(2.0), math.log(3.0)


def close(actual: torch.Tensor | float, expected: object, tolerance: float = NEAR_ONE) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = torch.as_tensor(actual)
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0)


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values)


def test_logprobs_and_entropy_by_hand():
    # softmax(log 3, 0) = (3/4, 1/4); softmax(0, 0) = (1/2, 1/2)
    logits = torch.tensor([[[LOG3, 0.0], [0.0, 0.0]]])
    close(token_logprobs(logits, torch.tensor([[1, 0]])), [[math.log(1 / 4), -LOG2]])
    first = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    close(token_entropy(logits), [[first, LOG2]])


def test_bf16_logits_are_computed_in_fp32():
    torch.manual_seed(0)
    logits = (torch.randn(2, 3, 50) * 4).bfloat16()
    targets = torch.randint(50, (2, 3))
    exact = logits.double().log_softmax(-1)
    logprobs, entropy = token_logprobs(logits, targets), token_entropy(logits)
    assert logprobs.dtype == entropy.dtype == torch.float32
    close(logprobs, exact.gather(-1, targets[..., None]).squeeze(-1), 2e-6)
    close(entropy, -(exact.exp() * exact).sum(-1), 2e-6)
    # In bf16 itself a log-probability of this size is off by more than a hundredth.
    rough = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    assert (rough.double() - logprobs.double()).abs().max() > DIFFERENT


def test_pairwise_loss_by_hand():
    # -log sigmoid(x) = log(1 + e^-x): log 2 for a tie, log 4/3 for a lead of log 3, log 4 behind
    chosen, rejected = torch.tensor([1.0, LOG3, 0.0]), torch.tensor([1.0, 0.0, LOG3])
    every = torch.ones(3, dtype=torch.bool)
    close(pairwise_loss(chosen, rejected, every), LOG2 + math.log(4 / 3) + 2 * LOG2)
    # A margin of log 3 turns the second pair into a tie.
    second = torch.tensor([False, True, False])
    close(pairwise_loss(chosen, rejected, second, margin=LOG3), LOG2)
    # Centring adds 0.1 * (1 + 1)^2 to the first.
    first = torch.tensor([True, False, False])
    close(pairwise_loss(chosen, rejected, first, centering_coefficient=0.1), LOG2 + 0.4)


def test_pairwise_loss_in_fp32_from_bf16_scores():
    chosen, rejected = torch.tensor([3.015625]).bfloat16(), torch.tensor([-5.0]).bfloat16()
    loss = pairwise_loss(chosen, rejected, torch.tensor([True]))
    assert loss.dtype == torch.float32
    expected = math.log1p(math.exp(-(chosen.item() + 5.0)))
    close(loss, expected, 2 * ROUNDING * expected)


def test_filler_pairs_get_no_gradient():
    chosen = torch.tensor([0.3, 50.0], requires_grad=True)
    rejected = torch.tensor([0.1, -80.0], requires_grad=True)
    real = torch.tensor([True, False])
    pairwise_loss(chosen, rejected, real, 0.2, 0.5).backward()
    assert chosen.grad[0] != 0 and chosen.grad[1] == 0 and rejected.grad[1] == 0


def test_policy_loss_by_hand():
    # ratios 1, 2, 1/2, 2, 1/2 at clip 0.2, each -min(A r, A clip(r)):
    #   A = 3, r = 1: -3        A = 1, r = 2: -1.2 (clipped)     A = 1, r = 1/2: -0.5
    #   A = -1, r = 2: 2        A = -1, r = 1/2: 0.8 (clipped)
    old = torch.zeros(1, 5)
    new = rows([0.0, LOG2, -LOG2, LOG2, -LOG2]).requires_grad_(True)
    advantages, mask = rows([3.0, 1.0, 1.0, -1.0, -1.0]), torch.ones(1, 5, dtype=torch.bool)
    loss = policy_loss(token_ratio(new, old, mask), advantages, mask, (0.2, 0.2))
    close(loss, -3 - 1.2 - 0.5 + 2 + 0.8)
    loss.backward()
    # d(-A r)/d(log p) = -A r, and nothing where the clipped side counts
    close(new.grad, [[-3.0, 0.0, -0.5, 2.0, 0.0]])


def test_value_loss_by_hand():
    # clip 0.2 around old values 0, returns 1, 1, 1, -1; the worse of both counts, halved:
    #   V = 0.5: clipped 0.2 is worse, 0.8^2 / 2 = 0.32      V = 0.1: not clipped, 0.9^2 / 2 = 0.405
    #   V = -1: itself is worse, 2^2 / 2 = 2                 V = -1: clipped -0.2, 0.8^2 / 2 = 0.32
    values = rows([0.5, 0.1, -1.0, -1.0]).requires_grad_(True)
    mask, returns = torch.ones(1, 4, dtype=torch.bool), rows([1.0, 1.0, 1.0, -1.0])
    loss = value_loss(values, torch.zeros(1, 4), returns, mask, 0.2)
    close(loss, 0.32 + 0.405 + 2.0 + 0.32)
    loss.backward()
    close(values.grad, [[0.0, -0.9, -2.0, 0.0]])  # V - R where V itself counts


@pytest.mark.parametrize("outside", [torch.inf, -torch.inf, torch.nan])
def test_policy_loss_never_sees_what_is_behind_the_answer(outside):
    mask = torch.tensor([[True, False]])
    new = rows([0.1, 0.0]).requires_grad_(True)
    shifted = new + rows([0.0, outside])
    ratio = token_ratio(shifted, torch.zeros(1, 2), mask)
    loss = policy_loss(ratio, rows([2.0, 0.0]), mask, (0.2, 0.2))
    close(loss, -2 * math.exp(0.1))
    loss.backward()
    close(new.grad, [[-2 * math.exp(0.1), 0.0]])


def test_without_clipping_the_value_loss_is_half_the_squared_error():
    values = rows([0.5, 9.0, 7.0]).requires_grad_(True)
    mask, returns = torch.tensor([[True, True, False]]), rows([1.0, -1.0, 0.0])
    loss = value_loss(values, torch.zeros(1, 3), returns, mask, 0.0)
    close(loss, (0.25 + 100.0) / 2)
    loss.backward()
    close(values.grad, [[-0.5, 10.0, 0.0]])


@pytest.mark.parametrize("outside", [0.0, 1000.0, torch.inf, torch.nan])
def test_kl_loss_by_hand(outside):
    # q/p = 2 and 1/2: k3 = 2 - 1 - log 2 and 1/2 - 1 + log 2; d k3 / d log p = 1 - q/p
    new = rows([-LOG2, LOG2, 0.0]).requires_grad_(True)
    reference = rows([0.0, 0.0, outside])
    loss = kl_loss(new, reference, torch.tensor([[True, True, False]]))
    close(loss, 0.5)
    loss.backward()
    close(new.grad, [[-1.0, 0.5, 0.0]])


def test_value_loss_never_sees_what_is_behind_the_answer():
    mask = torch.tensor([[True, False]])
    values = rows([0.0, 77.0]).requires_grad_(True)
    loss = value_loss(values, rows([0.0, -5.0]), rows([1.0, 9.0]), mask, 0.2)
    loss.backward()
    close(loss, 0.5)
    close(values.grad, [[-1.0, 0.0]])


def test_mean_scale():
    # 2 ranks, 8 tokens in all: each rank's sum times 2/8; DeepSpeed's mean over 2 makes it 1/8.
    assert mean_scale(8.0, 2) == 0.25
    assert mean_scale(0.0, 2) == 2.0  # a group of filler: the sums are 0 anyway


def loss_of(kind: str, weight: torch.Tensor, part: slice) -> tuple[torch.Tensor, float]:
    """A loss's sum over some of eight rows, as a function of one weight; and its count."""
    generator = torch.Generator().manual_seed(5)
    data = torch.randn(4, 8, 6, generator=generator)[:, part] * 0.3
    mask = (torch.rand(8, 6, generator=generator) < 0.6)[part]
    moved = data[0] * weight
    if kind == "policy":
        loss = policy_loss(token_ratio(moved, data[1], mask), data[2], mask, (0.2, 0.2))
    elif kind == "value":
        loss = value_loss(moved, data[1], data[2], mask, 0.2)
    elif kind == "pairs":
        mask = mask[:, 0]
        loss = pairwise_loss(moved[:, 0], data[1][:, 0], mask, 0.1, 0.01)
    else:
        mask[:, 0] = False
        ids = torch.randint(5, (8, 6), generator=generator)[part]
        logits = torch.randn(8, 6, 5, generator=generator)[part] * weight
        loss = -(token_logprobs(logits[:, :-1], ids[:, 1:]) * mask[:, 1:]).sum()
    return loss, float(mask.sum())


@pytest.mark.parametrize("kind", ["sft", "pairs", "policy", "value"])
@pytest.mark.parametrize(
    "ranks",
    [
        [[slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]],
        [[slice(0, 3), slice(3, 8)]],
        [[slice(0, 4)], [slice(4, 8)]],
        [[slice(0, 1), slice(1, 4)], [slice(4, 6), slice(6, 8)]],
    ],
)
def test_the_gradient_is_that_of_one_big_batch(kind, ranks):
    """However eight rows are dealt out, mean over the ranks of summed micro-batch gradients."""
    whole = torch.ones((), requires_grad=True)
    loss, count = loss_of(kind, whole, slice(0, 8))
    (loss / count).backward()
    gradients = []
    for micro_batches in ranks:
        weight = torch.ones((), requires_grad=True)
        for part in micro_batches:
            (loss_of(kind, weight, part)[0] * mean_scale(count, len(ranks))).backward()
        gradients.append(weight.grad)
    close(torch.stack(gradients).mean(), whole.grad.item())
    assert abs(whole.grad.item()) > DIFFERENT


def test_a_margin_for_each_pair_and_label_smoothing_by_hand():
    chosen, rejected = torch.tensor([2.0, 1.0, 9.0]), torch.tensor([1.0, 1.0, 0.0])
    real, margin = torch.tensor([True, True, False]), torch.tensor([0.5, -1.0, 0.0])
    loss = pairwise_loss(chosen, rejected, real, margin, label_smoothing=0.1)
    # d = 0.5 and 1: each 0.9 log(1 + e^-d) + 0.1 log(1 + e^d)
    by_hand = sum(
        0.9 * math.log1p(math.exp(-d)) + 0.1 * math.log1p(math.exp(d)) for d in (0.5, 1.0)
    )
    assert loss.item() == pytest.approx(by_hand, rel=NEAR_ONE)
