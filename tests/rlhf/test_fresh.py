"""No pass of the policy over answers whose log-probabilities the engine tells: the same steps."""

import copy
from unittest.mock import patch

import pytest
import torch

from dschat.rlhf import rollout
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer
from dschat.rlhf.static_model import StaticModel
from dschat.rlhf.static_rollout import StaticRollout
from tests.helpers.rounding import LOGITS, NEAR_ONE
from tests.helpers.tiers import tiers
from tests.rlhf.tiny_roles import FULL, LORA, Setting, ppo_trainer, prompts, without_critic

SETTING = Setting(micro_batch=8)


@pytest.mark.parametrize(
    ("changes", "rollouts", "accumulated", "expected"),
    [
        ({}, 1, 1, True),
        ({}, 2, 1, False),  # two steps: the policy has moved before the second
        ({}, 2, 2, True),
        ({"per_device_training_batch_size": 7}, 1, 1, False),  # micro-batches of 7 and 1
        ({"ppo_epochs": 2}, 1, 1, False),
        ({"advantage_estimator": "rloo"}, 1, 1, True),
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
            patch.object(DeepSpeedPPOTrainer, "tells_enough", lambda *_, fresh=fresh: fresh),
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
    assert 0 < statistics[True]["decode_gap"] < LOGITS and held_out["decode_gap_max"] < LOGITS
    expected = {n: v for n, v in statistics[False].items() if n != "decode_gap_max"}
    assert statistics[True] == pytest.approx(expected, abs=LOGITS)


LAYOUTS = {
    "full": {},
    "adapters, checkpointing": {"lora": LORA, "gradient_checkpointing": True},
    "adapters, ZeRO-2": {"lora": LORA, "zero_stage": 2},
    "four trunks": {"lora": LORA, "share_trunk": "none"},
}


@pytest.mark.parametrize("name", tiers(LAYOUTS, ("adapters, checkpointing",)))
def test_ppo_makes_one_pass_of_actor_and_critic_where_one_is_enough(load_roles, name):
    """The same steps as where every role scores before: to rounding of log-probabilities alone."""
    setting = Setting(micro_batch=4, **LAYOUTS[name])
    weights, passes, statistics = {}, {}, {}
    for once in (True, False):
        roles = load_roles(setting)
        trainer = ppo_trainer(roles, setting)
        actor = roles.actor.module
        trainer.engine = StaticRollout(StaticModel(actor), roles.tokenizer, 4)
        counted = {"critic": 0}
        hook = roles.critic.module.register_forward_hook(
            lambda *_, counted=counted: counted.update(critic=counted["critic"] + 1)
        )
        torch.manual_seed(0)
        with (
            patch.object(DeepSpeedPPOTrainer, "tells_enough", lambda *_, once=once: once),
            patch.object(PPOConfig, "first_pass_is_last", lambda *_, once=once: once),
            patch.object(rollout, "answer_logprobs", wraps=rollout.answer_logprobs) as scored,
        ):
            for _ in range(2):
                statistics[once] = trainer.train_rlhf(trainer.rollout([prompts()]))
        hook.remove()
        passes[once] = scored.call_count, counted["critic"]
        weights[once] = [
            p.detach().clone() for engine in roles.trained.values() for p in engine.parameters()
        ]
    # Of two iterations each; the critic's trunk also serves the reward model under adapters.
    rewards = 2 if roles.reward is None else 0
    assert passes == {True: (0, 2 + rewards), False: (2, 4 + rewards)}
    for one, other in zip(weights[True], weights[False], strict=True):
        torch.testing.assert_close(one, other, atol=2 * NEAR_ONE, rtol=0)
    assert statistics[True]["ratio"] == 1.0 and statistics[True]["decode_gap"] < LOGITS
    expected = {n: v for n, v in statistics[False].items() if n != "decode_gap_max"}
    # Explained variances of -14 round by more than a logit.
    assert statistics[True] == pytest.approx(expected, abs=LOGITS, rel=NEAR_ONE)


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_an_exact_engine_spares_the_pass_before_several_steps_too(load_roles, estimator):
    """Two epochs of two steps; the gap is that of the first step, whose ratio is 1."""
    lora = LORA if estimator == "gae" else FULL
    setting = Setting(micro_batch=2 if estimator == "gae" else 4, lora=lora)
    answers = 1 if estimator == "gae" else 2
    weights, passes, statistics = {}, {}, {}
    for told in (True, False):
        roles = load_roles(setting)
        if estimator != "gae":
            roles = without_critic(roles)
        trainer = ppo_trainer(
            roles,
            setting,
            advantage_estimator=estimator,
            answers_per_prompt=answers,
            ppo_epochs=2,
        )
        trainer.engine = StaticRollout(StaticModel(roles.actor.module), roles.tokenizer, 4)
        torch.manual_seed(0)
        with patch.object(rollout, "answer_logprobs", wraps=rollout.answer_logprobs) as scored:
            if not told:
                trainer.tells_enough = lambda *_: False
            for _ in range(2):
                (e,) = trainer.rollout([prompts()])
                assert e.from_sampler == told
                statistics[told] = trainer.train_rlhf([e])
        passes[told] = scored.call_count
        weights[told] = [p.detach().clone() for p in roles.actor.module.parameters()]
    assert passes == {True: 0, False: 4}
    for one, other in zip(weights[True], weights[False], strict=True):
        torch.testing.assert_close(one, other, atol=2 * NEAR_ONE, rtol=0)
    assert 0 < statistics[True]["decode_gap"] < LOGITS
    expected = {n: v for n, v in statistics[False].items() if n != "decode_gap_max"}
    assert statistics[True] == pytest.approx(expected, abs=LOGITS)


def test_what_is_only_nearly_the_policys_is_not_taken_for_its_own(load_roles):
    """In bf16 the sampler's log-probabilities are others: they may not become the KL penalty."""
    setting = Setting(dtype="bf16")
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting)
    trainer.engine = StaticRollout(StaticModel(roles.actor.module), roles.tokenizer, 4)
    (e,) = trainer.rollout([prompts()])
    assert not e.from_sampler and e.kept is not None


def test_a_kept_pass_serves_once_and_by_the_weights_that_made_it(load_roles):
    setting = Setting(lora=LORA)
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting)
    (first,), (late,) = trainer.rollout([prompts()]), trainer.rollout([prompts()])
    assert first.values is not None and not first.values.requires_grad
    chosen = first.rows(torch.tensor([2, 1, 3])).rows(torch.tensor([1, 0]))
    values = chosen.kept.taken(roles.critic)
    assert values.requires_grad
    torch.testing.assert_close(values * chosen.answer_mask, chosen.values)
    assert first.kept.taken(roles.critic) is None
    trainer.train_rlhf([first])  # by a pass of its own
    assert late.kept.taken(roles.critic) is None  # the critic has made a step
    assert late.kept.taken(roles.actor) is None
    copied = copy.deepcopy(late)
    assert copied.kept is None and torch.equal(copied.values, late.values)
    assert trainer.rollout([prompts()], answers_per_prompt=1)[0].kept is None
