"""Preference losses of DPO's family: log-probabilities of a pair's two answers to a loss per pair.

A loss compares two scores. Of an answer y to x with |y| tokens, end token included, and

    log pi(y | x) = sum over the tokens of y of log pi(token | x, tokens before it)
    ratio(y)      = log pi(y | x) - log pi_ref(y | x)

the score is the ratio, or log pi itself where the loss has no reference; `per_token` divides it by
|y|. A new loss is a function of two scores and its coefficients, and an entry of `_ALL`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dschat.lazy import torch

CLOSEST_TO_ONE = -1e-6  # log of the largest probability whose odds are taken


@dataclass(frozen=True)
class PairLogprobs:
    """Both answers of each pair: sums of log-probabilities, and numbers of tokens, all (B,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    ref_chosen: torch.Tensor | None = None
    ref_rejected: torch.Tensor | None = None


@dataclass(frozen=True)
class PreferenceLoss:
    """One way to learn from pairs.

    Attributes:
        loss: (B,) scores of the chosen, (B,) of the rejected, coefficients by name -> (B,).
        defaults: of its coefficients, the source's own unless said.
        per_token: scores are means per token, not sums.
        needs_kl: takes `kl` too, the policy's distance to its reference (`kto_loss`).
        full_rate: learning rate that suits training all weights of a model of 2.8 billion
            parameters, of width 2,560 (docs/dpo.md).
        holds: what holds the policy closer to where it began; empty: no coefficient does.
    """

    name: str
    loss: Callable[..., torch.Tensor]
    defaults: Mapping[str, float]
    source: str
    needs_reference: bool = True
    per_token: bool = False
    needs_kl: bool = False
    full_rate: float = 1e-6
    holds: str = "a larger beta"

    def scores(self, pairs: PairLogprobs) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) scores of the chosen and (B,) of the rejected answers; times beta the rewards."""
        chosen, rejected = pairs.chosen, pairs.rejected
        if self.needs_reference:
            assert pairs.ref_chosen is not None and pairs.ref_rejected is not None
            chosen, rejected = chosen - pairs.ref_chosen, rejected - pairs.ref_rejected
        if self.per_token:
            chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
        return chosen, rejected


def sigmoid_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float, label_smoothing: float
) -> torch.Tensor:
    """DPO (arXiv:2305.18290, eq. 7): -log sigmoid(h), h = beta (chosen - rejected), of ratios.

    With a share e of labels taken for wrong, conservative DPO (Mitchell 2023):
    -(1 - e) log sigmoid(h) - e log sigmoid(-h).
    """
    h = beta * (chosen - rejected)
    return -(1 - label_smoothing) * torch.nn.functional.logsigmoid(
        h
    ) - label_smoothing * torch.nn.functional.logsigmoid(-h)


def robust_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float, label_smoothing: float
) -> torch.Tensor:
    """Robust DPO (arXiv:2403.00409, eq. 12): DPO's loss without the bias of wrong labels.

    (-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e), with h as in `sigmoid_loss`: its mean
    over labels of which a share e is wrong is DPO's over the right ones.
    """
    h, e = beta * (chosen - rejected), label_smoothing
    return (
        -(1 - e) * torch.nn.functional.logsigmoid(h) + e * torch.nn.functional.logsigmoid(-h)
    ) / (1 - 2 * e)


def ipo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """IPO (arXiv:2310.12036, eq. 17): (chosen - rejected - 1 / (2 beta))^2, of ratios per token.

    The mean per token in place of the sum is the authors' correction of their code: the margin
    1 / (2 beta) is the same for short and for long answers.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """SLiC's hinge (arXiv:2305.10425, on ratios as in 2309.06657): max(0, 1 - h)."""
    return torch.nn.functional.relu(1 - beta * (chosen - rejected))


def apo_zero_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """APO-zero (arXiv:2408.06266, eq. 7): 1 - sigmoid(beta chosen) + sigmoid(beta rejected).

    It raises the chosen answers' own probability where DPO raises the difference alone.
    """
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def simpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    beta: float,
    simpo_gamma: float,
    label_smoothing: float,
) -> torch.Tensor:
    """SimPO (arXiv:2405.14734, eq. 6): -log sigmoid(h), h = beta (chosen - rejected) - gamma.

    Of log-probabilities per token, without a reference; smoothed as in `sigmoid_loss`.
    """
    h = beta * (chosen - rejected) - simpo_gamma
    return -(1 - label_smoothing) * torch.nn.functional.logsigmoid(
        h
    ) - label_smoothing * torch.nn.functional.logsigmoid(-h)


def orpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """ORPO (arXiv:2403.07691, eq. 6): -chosen - beta log sigmoid(difference of their log odds).

    Of log-probabilities log p per token, odds = p / (1 - p); beta is the paper's lambda. The first
    term is the answer's own loss in supervised fine-tuning.
    """
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - beta * torch.nn.functional.logsigmoid(log_odds)


def _log_odds(logprobs: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of log p; finite where p rounds to 1."""
    logprobs = logprobs.clamp(max=CLOSEST_TO_ONE)
    return logprobs - torch.log(-torch.expm1(logprobs))


def kto_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    kl: torch.Tensor,
) -> torch.Tensor:
    """KTO (arXiv:2402.01306, eq. 7-8), a pair's two answers as one desirable, one undesirable.

    Half of w_d (1 - sigmoid(beta (chosen - z))) + w_u (1 - sigmoid(beta (z - rejected))): a mean
    over answers. z is `kl`, () without gradient: the mean ratio of answers to other prompts, at
    least 0.
    """
    desirable = 1 - torch.sigmoid(beta * (chosen - kl))
    undesirable = 1 - torch.sigmoid(beta * (kl - rejected))
    return (desirable_weight * desirable + undesirable_weight * undesirable) / 2


SMOOTHING = {"label_smoothing": 0.0}
_ALL = (
    PreferenceLoss("sigmoid", sigmoid_loss, {"beta": 0.1} | SMOOTHING, "arXiv:2305.18290"),
    PreferenceLoss(
        "robust", robust_loss, {"beta": 0.1, "label_smoothing": 0.1}, "arXiv:2403.00409"
    ),
    PreferenceLoss(
        "ipo", ipo_loss, {"beta": 0.1}, "arXiv:2310.12036", per_token=True, full_rate=5e-7
    ),
    PreferenceLoss("hinge", hinge_loss, {"beta": 0.1}, "arXiv:2305.10425"),
    PreferenceLoss("apo_zero", apo_zero_loss, {"beta": 0.1}, "arXiv:2408.06266"),
    PreferenceLoss(
        "simpo",
        simpo_loss,
        {"beta": 2.0, "simpo_gamma": 1.0} | SMOOTHING,
        "arXiv:2405.14734",
        needs_reference=False,
        per_token=True,
        full_rate=5e-7,
        holds="",
    ),
    PreferenceLoss(
        "orpo",
        orpo_loss,
        {"beta": 10.0},  # the paper's 0.1 is for a model that has not seen step 1 (docs/dpo.md)
        "arXiv:2403.07691",
        needs_reference=False,
        per_token=True,
        holds="a smaller beta",
    ),
    PreferenceLoss(
        "kto",
        kto_loss,
        {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        "arXiv:2402.01306",
        needs_kl=True,
    ),
)
PREFERENCE_LOSSES = {loss.name: loss for loss in _ALL}
