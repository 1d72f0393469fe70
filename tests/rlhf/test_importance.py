"""Truncated importance weights: from the engine's distribution to the policy's."""

import math
from dataclasses import replace

import pytest
import torch

from dschat.errors import UserError
from dschat.functional.losses import importance_weights, policy_loss
from dschat.rlhf.generation import Sampled, SamplingConfig
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.rollout_engine import TransformersRollout
from tests.helpers.rounding import NEAR_ONE
from tests.rlhf.tiny_roles import Setting, ppo_trainer, prompts


def test_weights_by_hand():
    """p / q = 0.4 / 0.8, 0.9 / 0.1 beyond the cap, and a token outside the mask."""
    logprobs = torch.tensor([[0.4, 0.9, 0.5]]).log().requires_grad_()
    sampler = torch.tensor([[0.8, 0.1, 1e-30]]).log()
    mask = torch.tensor([[True, True, False]])
    weights = importance_weights(logprobs, sampler, mask, 2.0)
    assert weights.tolist() == [[pytest.approx(0.5), 2.0, 1.0]] and not weights.requires_grad
    # ratio 1 and advantages 1, 3: -(0.5 * 1 + 2 * 3)
    advantages = torch.tensor([[1.0, 3.0, 7.0]])
    loss = policy_loss(torch.ones(1, 3), advantages, mask, (0.2, 0.2), weights)
    assert loss.item() == pytest.approx(-6.5)


def test_weighted_tokens_of_another_distribution_have_the_policys_mean():
    """E_q[min(p / q, cap) f] = E_p[f] where no weight reaches the cap, here over all tokens."""
    torch.manual_seed(0)
    p, q, f = torch.randn(9).softmax(-1), torch.randn(9).softmax(-1), torch.randn(9)
    weights = importance_weights(p.log(), q.log(), torch.ones(9, dtype=torch.bool), 1e6)
    torch.testing.assert_close((q * weights * f).sum(), (p * f).sum())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rollout_importance_cap": 0.5}, "rollout_importance_cap is 0.5: where engine and"),
        ({"sampling": SamplingConfig(top_p=0.9)}, "with top_p answers come from a part"),
        ({"sampling": SamplingConfig(top_k=5)}, "with top_k answers come from a part"),
        ({"sampling": SamplingConfig(min_answer_seq_len=2)}, "drop min_answer_seq_len, or"),
    ],
)
def test_what_no_weight_corrects_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PPOConfig(**{"rollout_importance_cap": 2.0, **settings})


class Elsewhere:
    """An engine whose distribution is off by the same amount for every token."""

    refills = False

    def __init__(self, inner: TransformersRollout, gap: float | None):
        self.inner, self.gap = inner, gap

    def generate(self, prompts, sampling) -> Sampled:
        sampled = self.inner.generate(prompts, sampling)
        return replace(sampled, logprobs=None if self.gap is None else sampled.logprobs - self.gap)

    def weights_changed(self) -> None:
        pass


def trainer_of(load_roles, gap: float | None, cap: float):
    roles = load_roles(Setting())
    trainer = ppo_trainer(roles, Setting(), rollout_importance_cap=cap, whiten_advantages="never")
    trainer.engine = Elsewhere(TransformersRollout(roles.actor, roles.tokenizer), gap)
    return trainer


def test_the_policy_loss_is_corrected_and_the_share_at_the_cap_told(load_roles):
    losses = {}
    for gap, cap in ((0.0, 0.0), (math.log(1.5), 2.0), (math.log(3.0), 2.0)):
        trainer = trainer_of(load_roles, gap, cap)
        torch.manual_seed(0)
        (e,) = trainer.advantages(trainer.rollout([prompts()]))[0]
        losses[gap] = {name: float(x) for name, x in trainer.updates.actor_loss(e)[1].items()}
    plain, within, beyond = losses.values()
    assert "importance_capped" not in plain
    assert within["actor_loss"] == pytest.approx(1.5 * plain["actor_loss"], rel=NEAR_ONE)
    assert within["importance_capped"] == 0
    assert beyond["actor_loss"] == pytest.approx(2.0 * plain["actor_loss"], rel=NEAR_ONE)
    assert beyond["importance_capped"] == beyond["tokens"]


def test_an_engine_that_does_not_tell_cannot_be_corrected(load_roles):
    with pytest.raises(UserError, match="Elsewhere does not tell the log-probabilities"):
        trainer_of(load_roles, None, 2.0).rollout([prompts()])
