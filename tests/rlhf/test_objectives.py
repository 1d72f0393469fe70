"""The policy's objective against TRL's, and which settings of it are refused.

The numbers are those of `GRPOTrainer._compute_loss` of TRL 1.16.0, run on the tensors below with
`epsilon` 0.2, `max_completion_length` 8 and one process: its `loss_type` dapo, grpo and dr_grpo are
the aggregations token, answer and constant; `mask_truncated_completions` sets the mask of a cut
completion to 0 before the loss is taken. For each the loss, and the norm of its gradient with
respect to the log-probabilities.
"""

import dataclasses
import math

import pytest
import torch

from dschat.errors import UserError
from dschat.functional import losses
from dschat.functional.returns import group_centred, group_normalised
from dschat.rlhf.advantages import with_advantages
from dschat.rlhf.experience import Experience
from dschat.rlhf.objectives import clip_sums, loss_count, policy_objective
from dschat.rlhf.policy_config import PolicyConfig
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.ppo_statistics import StepMeans, masked_share
from dschat.settings import flags_of
from dschat.train.transfer import read_sums
from tests.helpers.rounding import FIGURE, NEAR_ONE, ROUNDING

NEW = [[-1.0, -2.0, -0.5, -1.5], [-0.7, -1.2, -3.0, 0.0], [-2.0, -1.0, 0.0, 0.0]]
OLD = [[-1.3, -1.6, -0.5, -2.5], [-0.9, -1.1, -2.2, 0.0], [-1.5, -1.2, 0.0, 0.0]]
REFERENCE = [[-1.1, -2.4, -0.8, -1.5], [-0.5, -1.9, -2.8, 0.0], [-2.0, -0.6, 0.0, 0.0]]
MASK = [[True, True, True, True], [True, True, True, False], [True, True, False, False]]
ADVANTAGES = [1.5, -0.5, -1.0]
PLAIN, HIGH, MASKED = (None, 0.0, False), (0.4, 0.1, False), (None, 0.1, True)  # high, KL, masks
TRL = {
    ("token", "token", PLAIN): (-0.2912175, 0.2565309),
    ("token", "token", HIGH): (-0.3445584, 0.3361691),
    ("token", "token", MASKED): (0.7035289, 0.2809813),
    ("token", "sequence", PLAIN): (-0.4753982, 0.1352472),
    ("token", "sequence", HIGH): (-0.5053113, 0.4340816),
    ("token", "sequence", MASKED): (0.5909075, 0.2368887),
    ("answer", "token", PLAIN): (-0.0093207, 0.2668645),
    ("answer", "token", HIGH): (-0.0478962, 0.3089238),
    ("answer", "token", MASKED): (0.5036597, 0.2134776),
    ("answer", "sequence", PLAIN): (-0.1797640, 0.2028708),
    ("answer", "sequence", HIGH): (-0.2007685, 0.3676454),
    ("answer", "sequence", MASKED): (0.4244263, 0.1972698),
    ("constant", "token", PLAIN): (-0.1092066, 0.0961991),
    ("constant", "token", HIGH): (-0.1292094, 0.1260634),
    ("constant", "token", MASKED): (0.1465685, 0.0585378),
    ("constant", "sequence", PLAIN): (-0.1782743, 0.0507177),
    ("constant", "sequence", HIGH): (-0.1894917, 0.1627806),
    ("constant", "sequence", MASKED): (0.1231057, 0.0493518),
}


def experience(count: int = 3) -> Experience:
    """The three answers, the first one cut at the limit; and fillers."""
    answers = torch.tensor([*MASK, *[[False] * 4] * (count - 3)])
    more = [[0.0] * 4] * (count - 3)
    real = torch.arange(count) < 3
    zeros = torch.zeros(count, 6, dtype=torch.long)
    e = Experience(
        sequences=zeros,
        attention_mask=zeros.bool(),
        answer_mask=answers,
        ended=torch.arange(count) != 0,
        real=real,
        logprobs=torch.tensor([*OLD, *more]),
        ref_logprobs=torch.tensor([*REFERENCE, *more]),
        values=None,
        model_scores=None,
        group=torch.zeros(count, dtype=torch.long),
        rewards=torch.zeros(count),
    )
    return e


def config_of(aggregation: str, level: str, high: float | None, masks: bool) -> PPOConfig:
    return PPOConfig.of(
        advantage_estimator="grpo",
        answers_per_prompt=3,
        max_answer_seq_len=8,
        loss_aggregation=aggregation,
        importance_level=level,
        cliprange_high=high,
        mask_truncated_answers=masks,
    )


def learned(e: Experience, config: PPOConfig) -> Experience:
    """With the mask of the losses, and advantages that are given."""
    (e,) = with_advantages([e], config, 0.0)
    given = torch.tensor([*ADVANTAGES, *[9.0] * (len(e) - 3)])
    return dataclasses.replace(e, advantages=given[:, None] * e.answer_mask)


def mean_of(parts: list[Experience], config: PPOConfig, kl: float) -> tuple[float, float]:
    """Loss and norm of the gradient over micro-batches, as an optimizer step makes them."""
    total, squares, means = 0.0, 0.0, StepMeans("actor")
    count = sum(loss_count(e, config) for e in parts).item()
    for e in parts:
        rows = [NEW[i] if i < 3 else [0.0] * 4 for i in e.group.tolist()]
        new = torch.tensor(rows, requires_grad=True)
        loss, sums = policy_objective(e, new, torch.zeros_like(new), config, kl)
        (loss / count).backward()
        squares += new.grad.square().sum().item()
        total += loss.item() / count
        means.add(*read_sums([sums]))
    assert means.means()["actor_loss"] == pytest.approx(total, abs=FIGURE)
    return total, math.sqrt(squares)


@pytest.mark.parametrize("case", TRL, ids=str)
def test_loss_and_gradient_are_trls_in_any_micro_batches(case):
    aggregation, level, (high, kl, masks) = case
    config = config_of(aggregation, level, high, masks)
    e = learned(experience(5), config)
    e = dataclasses.replace(e, group=torch.arange(5))
    for split in ([5], [1, 4], [2, 2, 1]):
        parts = [e.rows(index) for index in torch.arange(5).split(split)]
        assert mean_of(parts, config, kl) == pytest.approx(TRL[case], abs=NEAR_ONE)


def test_an_answer_without_a_score_is_out_of_loss_and_count():
    """A cut answer that is masked counts as an answer, as in TRL; an unscored one does not."""
    for aggregation in ("token", "answer", "constant"):
        config = config_of(aggregation, "token", None, masks=False)
        e = experience()
        e = dataclasses.replace(e, scored=torch.tensor([True, False, True]))
        without = learned(e, config)
        without = dataclasses.replace(without, group=torch.arange(3))
        alone = without.rows(torch.tensor([0, 2]))
        one, other = (mean_of([part], config, 0.1) for part in (without, alone))
        assert one == pytest.approx(other, abs=2 * ROUNDING)
        masked = config_of(aggregation, "token", None, masks=True)
        counts = [loss_count(learned(e, c), c) for c in (config, masked)]
        assert counts == ([6, 2] if aggregation == "token" else [2, 2])
    assert masked_share([learned(e, masked)]) == 0.5  # of the two that have a score


def test_shares_beyond_the_clip_by_side_and_by_level():
    moved = torch.tensor([[0.25, -0.25, 0.45, 0.9]])
    mask = torch.tensor([[True, True, True, False]])
    assert clip_sums(moved, mask, config_of("token", "token", None, False)) == {"clip_fraction": 3}
    assert clip_sums(moved, mask, config_of("token", "token", 0.4, False)) == {
        "clip_fraction": 2,
        "clip_fraction_low": 1,
        "clip_fraction_high": 1,
    }
    # Another name, which the rule about long updates does not look at.
    assert clip_sums(moved, mask, config_of("token", "sequence", None, False)) == {
        "answer_clip_fraction": 3
    }


def test_deviations_by_hand():
    # mean 3; squares 4, 1, 9 are 14: sqrt(14 / 3) of the population, sqrt(14 / 2) of the sample,
    # which is TRL's scale_rewards "group"; "none" is Dr. GRPO's.
    scores, group = torch.tensor([1.0, 2.0, 6.0, 8.0]), torch.zeros(4, dtype=torch.long)
    real = torch.tensor([True, True, True, False])
    config = PPOConfig.of(advantage_estimator="grpo", answers_per_prompt=3, advantage_std="none")
    assert group_centred(scores, group, real).tolist() == [-2.0, -1.0, 3.0, 0.0]
    for correction, variance in ((0, 14 / 3), (1, 7)):
        found = group_normalised(scores, group, real, correction=correction).tolist()
        expected = [x / (math.sqrt(variance) + 1e-4) for x in (-2.0, -1.0, 3.0)]
        assert found == pytest.approx([*expected, 0.0], abs=NEAR_ONE)
    e = dataclasses.replace(experience(), rewards=torch.tensor([1.0, 2.0, 6.0]))
    (e,) = with_advantages([e], config, 0.0)
    assert e.advantages[:, 0].tolist() == [-2.0, -1.0, 3.0]
    assert not config.estimator.is_normalised and config.estimator.kl_in_loss


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"advantage_std": "none"}, "advantage_estimator gae divides by no deviation"),
        ({"advantage_std": "sample", "advantage_estimator": "rloo"}, "rloo divides by no"),
        ({"importance_level": "sequence"}, "each token has an advantage of its own"),
        ({"dynamic_sampling_rounds": 2}, "gae compares no answers to one prompt"),
        ({"mask_truncated_answers": True, "missing_eos_penalty": 1.0}, "drop one of the two"),
        ({"cliprange_high": 0.0}, "cliprange_high is 0.0: give a number above 0"),
        (
            {"advantage_estimator": "grpo", "whiten_advantages": "always"},
            "grpo measures advantages in deviations",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(given, words):
    with pytest.raises(UserError) as caught:
        PPOConfig.of(answers_per_prompt=2, **given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_makes_sense_is_taken():
    grpo = {"advantage_estimator": "grpo", "answers_per_prompt": 2}
    PPOConfig.of(**grpo, advantage_std="none", whiten_advantages="always")
    PPOConfig.of(**grpo, mask_truncated_answers=True, missing_eos_penalty=1.0)
    assert PPOConfig.of(cliprange_high=0.28).clip_range == (0.2, 0.28)
    assert PPOConfig.of(cliprange=0.1).clip_range == (0.1, 0.1)


def test_choices_are_those_that_exist():
    choices = {flag.name: flag.rule.choices for flag in flags_of(PolicyConfig)}
    assert choices["importance_level"] == tuple(losses.RATIOS)
    lengths = torch.tensor([[True, True, False]])
    weights = [
        losses.answer_weights(lengths, name, 8).item() for name in choices["loss_aggregation"]
    ]
    assert weights == [1.0, 0.5, 0.125]
