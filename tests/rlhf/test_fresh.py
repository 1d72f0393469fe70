"""No pass of the policy over answers whose first ratio is 1 by construction: the same step."""

from unittest.mock import patch

import pytest
import torch

from dschat.rlhf import rollout
from dschat.rlhf.ppo_config import PPOConfig
from tests.rlhf.tiny_roles import Setting, ppo_trainer, prompts, without_critic

SETTING = Setting(micro_batch=8)


@pytest.mark.parametrize(
    ("changes", "rollouts", "accumulated", "expected"),
    [
        ({}, 1, 1, True),
        ({}, 2, 1, False),  # two steps: the policy has moved before the second
        ({}, 2, 2, True),
        ({"per_device_training_batch_size": 7}, 1, 1, False),  # micro-batches of 7 and 1
        ({"ppo_epochs": 2}, 1, 1, False),
        ({"advantage_estimator": "rloo"}, 1, 1, False),  # its KL penalty is in the reward
        ({"rollout_importance_cap": 2.0}, 1, 1, False),  # needs both log-probabilities
    ],
)
def test_when_nothing_needs_the_policy_before_its_step(changes, rollouts, accumulated, expected):
    given = {
        "advantage_estimator": "grpo",
        "answers_per_prompt": 2,
        "per_device_generation_batch_size": 4,
        "per_device_training_batch_size": 8,
    }
    config = PPOConfig(**{**given, **changes})
    assert config.first_ratio_is_last(rollouts, accumulated) == expected


def test_the_step_is_that_of_scored_answers_and_its_gap_is_told(load_roles):
    weights, passes, statistics = {}, {}, {}
    for fresh in (True, False):
        roles = without_critic(load_roles(SETTING))
        trainer = ppo_trainer(roles, SETTING, advantage_estimator="grpo", answers_per_prompt=2)
        assert trainer.config.first_ratio_is_last(1, 1)
        torch.manual_seed(0)
        with (
            patch.object(PPOConfig, "first_ratio_is_last", lambda *_, fresh=fresh: fresh),
            patch.object(rollout, "answer_logprobs", wraps=rollout.answer_logprobs) as scored,
        ):
            for _ in range(2):
                statistics[fresh] = trainer.train_rlhf(trainer.rollout([prompts()]))
            held_out = trainer.evaluate([prompts()])
        passes[fresh] = scored.call_count
        weights[fresh] = [p.detach().clone() for p in roles.actor.module.parameters()]
    # Of two rollouts each, and of an evaluation, which always scores.
    assert passes == {True: 1, False: 3}
    for one, other in zip(weights[True], weights[False], strict=True):
        assert torch.equal(one, other)
    assert statistics[True]["ratio"] == 1.0 and statistics[True]["approx_kl"] == 0.0
    assert 0 < statistics[True]["decode_gap"] < 1e-5 and held_out["decode_gap_max"] < 1e-5
    expected = {n: v for n, v in statistics[False].items() if n != "decode_gap_max"}
    assert statistics[True] == pytest.approx(expected, abs=1e-5)
