"""Which rows and tokens an update learns from: all that are real, and nothing else."""

import dataclasses
import math

import pytest
import torch

from dschat.rlhf.experience import Experience
from dschat.rlhf.part_config import EMAConfig
from tests.helpers.rounding import LOGITS, MOVED, NEAR_ONE
from tests.rlhf.tiny_roles import (
    Setting,
    assert_same,
    largest_change,
    ppo_trainer,
    rollout,
    weights,
    without_critic,
)


def test_a_window_may_span_rollouts_of_different_width(load_roles):
    """Two rollouts of 4 rows, windows of 8: one step, with its mean over both."""
    setting = Setting(accumulation=2)
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting)
    both = [rollout(trainer, 0), rollout(trainer, 1, [1, 1, 3, 2])]
    assert both[0].answer_mask.shape != both[1].answer_mask.shape
    steps = roles.actor.global_steps
    statistics = trainer.train_rlhf(both)
    assert roles.actor.global_steps == roles.critic.global_steps == steps + 1
    tokens = [e.answer_mask.sum().item() for e in both]
    assert tokens == [15, 7]
    assert statistics["answer_length"] == pytest.approx(22 / 8)
    assert statistics["ratio"] == pytest.approx(1.0, abs=NEAR_ONE)


def test_filler_rows_change_nothing(load_roles):
    setting, results = Setting(), []
    for filler in (False, True):
        roles = load_roles(setting)
        trainer = ppo_trainer(roles, setting)
        e = rollout(trainer, lengths=[3, 5, 1, 2])
        real = torch.tensor([True, True, True, False])
        e = dataclasses.replace(e, real=real, answer_mask=e.answer_mask & real[:, None])
        statistics = trainer.train_rlhf([e if filler else e.rows(torch.arange(3))])
        results.append((weights(roles.actor.module), weights(roles.critic.module), statistics))
    assert_same(results[0][0], results[1][0], 1e-6)
    assert_same(results[0][1], results[1][1], 1e-6)
    assert results[0][2] == pytest.approx(results[1][2], abs=LOGITS)
    assert results[1][2]["answer_length"] == pytest.approx(3.0)
    assert results[1][2]["ended"] == 1.0


def test_answers_of_a_lone_end_token_and_batches_of_filler(load_roles):
    setting = Setting(micro_batch=2)
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting)
    e = rollout(trainer, lengths=[1, 1, 1, 1])
    assert e.answer_mask.shape == (4, 1) and e.answer_mask.all() and e.ended.all()
    assert all(math.isfinite(v) for v in trainer.train_rlhf([e]).values())

    # A rank may get a batch of nothing but filler; it makes its passes and learns nothing.
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting)
    before = weights(roles.actor.module)
    none = torch.zeros(4, dtype=torch.bool)
    e = dataclasses.replace(e, real=none, answer_mask=e.answer_mask & none[:, None])
    assert all(math.isfinite(v) for v in trainer.train_rlhf([e]).values())
    assert largest_change(before, weights(roles.actor.module)) == 0.0


@pytest.mark.parametrize("warmup", [0, 1])
def test_groups_of_fillers_make_no_step(load_roles, warmup):
    """Four groups of one row, of which one is real: one step, and schedules pass over three."""
    setting, results = Setting(micro_batch=1, ema=EMAConfig(True, 0.5)), []
    for rows in (4, 1):
        roles = load_roles(setting)
        trainer = ppo_trainer(roles, setting, ppo_epochs=2, critic_warmup_iterations=warmup)
        e, real = rollout(trainer), torch.arange(4) == 0
        e = dataclasses.replace(e, real=real, answer_mask=e.answer_mask & real[:, None])
        statistics = trainer.train_rlhf([e.rows(torch.arange(rows))])
        assert roles.critic.global_steps == 2 and roles.critic.lr_scheduler.last_epoch == 2 * rows
        assert roles.actor.global_steps == (0 if warmup else 2)
        assert roles.actor.lr_scheduler.last_epoch == (0 if warmup else 2 * rows)
        assert statistics["actor_updates"] == (0.0 if warmup else 1.0)
        trained = [weights(engine.module) for engine in roles.trained.values()]
        results.append(([*trained, dict(roles.ema.shadow)], statistics))
    for filled, alone in zip(results[0][0], results[1][0], strict=True):
        assert_same(filled, alone, 1e-6)
    assert results[0][1] == pytest.approx(results[1][1], abs=LOGITS)


def test_what_lies_behind_the_answers_shows_nowhere(load_roles):
    """Behind an end token probabilities may drift without bound: e^1000 is no number of fp32."""
    setting, results = Setting(), []
    for behind in (None, -1000.0, 1000.0):
        roles = load_roles(setting)
        trainer = ppo_trainer(roles, setting, ppo_epochs=2)
        e = rollout(trainer)
        if behind is not None:
            e = dataclasses.replace(
                e,
                logprobs=e.logprobs.where(e.answer_mask, behind),
                ref_logprobs=e.ref_logprobs.where(e.answer_mask, -behind),
            )
        statistics = trainer.train_rlhf([e])
        assert all(math.isfinite(value) for value in statistics.values())
        results.append((weights(roles.actor.module), weights(roles.critic.module), statistics))
    for actor, critic, statistics in results[1:]:
        assert_same(actor, results[0][0], 0.0)
        assert_same(critic, results[0][1], 0.0)
        assert statistics == results[0][2]


def wider(e: Experience, left: int, right: int) -> Experience:
    """The same with more padding in front of the prompts and behind the answers, noise in it."""
    torch.manual_seed(9)
    rows = len(e)

    def padded(column: torch.Tensor, before: int) -> torch.Tensor:
        width = column.shape[1] + before + right
        if column.dtype == torch.bool:
            wide = torch.zeros(rows, width, dtype=torch.bool)
        elif column.dtype == torch.int64:
            wide = torch.randint(3, 200, (rows, width))
        else:
            wide = torch.randn(rows, width) * 50
        wide[:, before : before + column.shape[1]] = column
        return wide

    texts = {n: padded(getattr(e, n), left) for n in ("sequences", "attention_mask")}
    names = ("answer_mask", "logprobs", "ref_logprobs", "values", "sampler_logprobs")
    answers = {n: padded(getattr(e, n), 0) for n in names if getattr(e, n) is not None}
    return dataclasses.replace(e, **texts, **answers)


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_padding_changes_nothing(load_roles, estimator):
    setting, results = Setting(), []
    for left, right in ((0, 0), (7, 3)):
        roles, changes = load_roles(setting), {}
        if estimator != "gae":
            roles = without_critic(roles)
            changes = {"advantage_estimator": estimator, "answers_per_prompt": 2}
        trainer = ppo_trainer(roles, setting, ppo_epochs=3, update_kl_limit=10.0, **changes)
        e = dataclasses.replace(rollout(trainer), group=torch.tensor([0, 1, 1, 0]))
        before = weights(roles.actor.module)
        statistics = trainer.train_rlhf([wider(e, left, right)])
        assert largest_change(before, weights(roles.actor.module)) > MOVED
        results.append((weights(roles.actor.module), statistics, roles.critic))
    (one, one_figures, critic), (other, other_figures, other_critic) = results
    assert_same(one, other, 1e-6)
    assert one_figures == pytest.approx(other_figures, abs=LOGITS)
    if critic is not None:
        assert_same(weights(critic.module), weights(other_critic.module), 1e-6)
