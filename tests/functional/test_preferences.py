"""Preference losses by hand, and against TRL 1.16's on the same logits."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch

from dschat.functional.preferences import PREFERENCE_LOSSES, PairLogprobs, robust_loss
from tests.functional.test_losses import close
from tests.helpers.rounding import FIGURE

LOG3 = math.log(3.0)

# From TRL 1.16.0 in float64, on `logits(1)` against the reference's `logits(2)`: the mean loss of
# two pairs, and of its gradient on the logits the norm and two entries. DPOTrainer, experimental
# CPOTrainer (SimPO) and ORPOTrainer; ORPO's first term is the chosen answers' mean -log p per token
# instead of that over prompts and answers; KTO's z is given.
TRL = {
    "sigmoid": (0.7215906743741637, 0.0902948122758014, 0.01039206414544332, 0.01579211305747022),
    "robust": (0.8528105341818365, 0.46373642534819637, 0.055930496617179075, 0.08499377155271284),
    "ipo": (7.844383707308788, 3.5968204749235833, 0.30935920771079023, 0.9402242932998759),
    "hinge": (1.2393542560476214, 0.8743223840164209, 0.09316916627065694, 0.14158284500789992),
    "apo_zero": (
        1.0371791327697286,
        0.12562985414197786,
        0.013413631970237231,
        0.02080007954152119,
    ),
    "simpo": (1.0434118360423843, 0.7609042143896408, 0.05288887251596037, 0.1607432445690596),
    "orpo": (2.907332205025609, 0.5674607430199389, 0.05333954135467079, 0.020745580890870377),
    "kto": (0.5143771294253717, 0.0638629290719375, 0.007829992763346574, 0.007380275761520628),
}
COEFFICIENTS = {
    "sigmoid": {"beta": 0.1, "label_smoothing": 0.0},
    "robust": {"beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"beta": 0.2},
    "hinge": {"beta": 0.5},
    "apo_zero": {"beta": 0.3},
    "simpo": {"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1},
    "orpo": {"beta": 0.25},
    "kto": {
        "beta": 0.3,
        "desirable_weight": 1.2,
        "undesirable_weight": 0.7,
        "kl": torch.tensor(0.4, dtype=torch.float64),
    },
}
TOKENS = torch.tensor([4, 2, 2, 3])
STARTS, ENDS = torch.tensor([2, 3, 2, 3]), torch.tensor([6, 5, 4, 6])


def logits(shift: int) -> torch.Tensor:
    """Of two chosen sequences, then two rejected: (4, 6, 5)."""
    b, t, v = torch.meshgrid(torch.arange(4), torch.arange(6), torch.arange(5), indexing="ij")
    return 2 * torch.sin((shift + 3 * b + 7 * t + 11 * v).double())


def sums(of: torch.Tensor) -> torch.Tensor:
    """(4,) log-probabilities of the answers, tokens STARTS to ENDS of each sequence."""
    ids = (2 * torch.arange(4)[:, None] + 3 * torch.arange(6)) % 5
    places = torch.arange(6)
    mask = (places >= STARTS[:, None]) & (places < ENDS[:, None])
    found = of[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (found * mask[:, 1:]).sum(-1)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_loss_and_gradient_are_those_of_trl(name: str):
    policy, loss = logits(1).requires_grad_(), PREFERENCE_LOSSES[name]
    answers, reference = sums(policy), sums(logits(2))
    pairs = PairLogprobs(*answers.chunk(2), *TOKENS.chunk(2), *reference.chunk(2))
    value = loss.loss(*loss.scores(pairs), **COEFFICIENTS[name]).mean()
    value.backward()
    found = (value, policy.grad.norm(), policy.grad[0, 2, 1], policy.grad[2, 1, 0])
    close(torch.stack([x.detach() for x in found]), TRL[name], 4 * FIGURE)


def test_a_loss_needs_no_reference_exactly_where_it_says_so():
    answers = sums(logits(1)).chunk(2)
    for loss in PREFERENCE_LOSSES.values():
        if loss.needs_reference:
            with pytest.raises(AssertionError):
                loss.scores(PairLogprobs(*answers, *TOKENS.chunk(2)))
        else:
            loss.scores(PairLogprobs(*answers, *TOKENS.chunk(2)))


def test_the_coefficients_are_the_functions_arguments():
    for loss in PREFERENCE_LOSSES.values():
        taken = [*inspect.signature(loss.loss).parameters][2:]
        assert taken == [*loss.defaults, *(["kl"] if loss.needs_kl else [])], loss.name


def test_scores_and_defaults_are_those_of_the_docs():
    text = Path(__file__, "../../../docs/dpo.md").resolve().read_text(encoding="utf-8")
    table = text.split("## Losses")[1].split("**KTO**")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:] for line in table.splitlines() if line[:3] == "| `"]
    told = {name.strip(" `"): (score.strip(), more) for name, score, _, more, *_ in rows}
    assert {*told} == {*PREFERENCE_LOSSES, "--loss_type"}
    for name, loss in PREFERENCE_LOSSES.items():
        score, coefficients = told[name]
        of = "ratio" if loss.needs_reference else "log π"
        assert score == of + (r" / \|y\|" if loss.per_token else ""), name
        found = re.findall(r"`--(\w+)` ([\d.]+)", coefficients)
        assert {key: float(value) for key, value in found} == loss.defaults, name
        assert loss.source.removeprefix("arXiv:") in table, name
    half = re.search(r"half of that with\s+`(\w+)` and `(\w+)`", text)
    slow = {name for name, loss in PREFERENCE_LOSSES.items() if loss.full_rate == 5e-7}
    assert half is not None and {*half.groups()} == slow
    assert {loss.full_rate for loss in PREFERENCE_LOSSES.values()} == {5e-7, 1e-6}


def one(name: str, chosen: float, rejected: float, **coefficients: object) -> torch.Tensor:
    """Loss of one pair of scores in fp32."""
    loss = PREFERENCE_LOSSES[name]
    scores = torch.tensor([chosen]), torch.tensor([rejected])
    return loss.loss(*scores, **dict(loss.defaults) | coefficients)


def test_losses_by_hand():
    # h = 0.5 (LOG3 - -LOG3) = log 3: sigmoid(h) = 3/4
    close(one("sigmoid", LOG3, -LOG3, beta=0.5), [-math.log(3 / 4)])
    smoothed = -0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4)
    close(one("sigmoid", LOG3, -LOG3, beta=0.5, label_smoothing=0.1), [smoothed])
    robust = (-0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4)) / 0.8
    close(one("robust", LOG3, -LOG3, beta=0.5, label_smoothing=0.1), [robust])
    close(one("ipo", 2.0, 0.5, beta=0.5), [0.25])  # (1.5 - 1)^2
    close(one("hinge", 2.0, 0.5, beta=0.4), [0.4])  # 1 - 0.6
    close(one("hinge", 9.0, 0.5, beta=0.4), [0.0])
    close(one("apo_zero", LOG3, -LOG3, beta=1.0), [1 / 4 + 1 / 4])
    close(one("simpo", -1.0, -1.0 - LOG3, beta=2.0, simpo_gamma=LOG3), [-math.log(3 / 4)])
    # p = 3/4 and 1/4: odds 3 and 1/3, their ratio's log is log 9, sigmoid 9/10
    close(one("orpo", math.log(3 / 4), math.log(1 / 4), beta=2.0),
          [-math.log(3 / 4) - 2 * math.log(9 / 10)])  # fmt: skip
    kl = torch.tensor(1.0)
    close(one("kto", 1 + LOG3, 1.0, beta=1.0, undesirable_weight=3.0, kl=kl), [(1 / 4 + 3 / 2) / 2])


def test_orpo_pushes_rejected_answers_away_about_as_much_as_it_learns_chosen_ones():
    """By default: at a weight of 0.1 a step is nearly all supervised fine-tuning."""
    scores = torch.full((2, 1), math.log(1 / 4), requires_grad=True)
    loss = PREFERENCE_LOSSES["orpo"]
    loss.loss(*scores, **loss.defaults).sum().backward()
    # d log odds / d log p = 1 / (1 - p) = 4/3, sigmoid 1/2: 1 + 10 * 4/3 / 2 up, 10 * 4/3 / 2 down
    close(scores.grad.flatten(), [-1 - 20 / 3, 20 / 3])


def test_robust_is_unbiased_under_wrong_labels():
    """The mean over labels of which 0.3 are wrong is the loss of the right ones."""
    scores, e = (torch.tensor([1.7]), torch.tensor([-0.4])), 0.3
    mean = (1 - e) * robust_loss(*scores, 0.5, e) + e * robust_loss(*scores[::-1], 0.5, e)
    close(mean, one("sigmoid", 1.7, -0.4, beta=0.5))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_far_away_the_loss_and_its_gradient_stay_finite(name: str):
    """Sums of 4,096 tokens that moved by ten nats each; per token a probability of one, of none."""
    loss = PREFERENCE_LOSSES[name]
    far = 40960.0 if loss.needs_reference and not loss.per_token else 50.0
    more = {"kl": torch.tensor(far)} if loss.needs_kl else {}
    for chosen, rejected in ((-far, 0.0), (0.0, -far), (-far, -far), (0.0, 0.0)):
        scores = torch.tensor([[chosen], [rejected]], requires_grad=True)
        value = loss.loss(*scores, **loss.defaults, **more)
        value.sum().backward()
        assert torch.isfinite(value).all() and torch.isfinite(scores.grad).all(), (chosen, rejected)
