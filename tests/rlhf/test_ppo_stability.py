"""What holds an update in bounds: the critic's warm-up, the early end, KL control, resuming."""

from __future__ import annotations

import dataclasses
import shlex

import pytest
import torch

from dschat.config import RLHFSettings
from dschat.config.cli import parse
from dschat.rlhf.part_config import EMAConfig
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.utils.optim import group_rates
from tests.helpers.rounding import FIGURE, MOVED, NEAR_ONE
from tests.helpers.tiny import byte_tokenizer
from tests.rlhf.tiny_roles import (
    FULL,
    LORA,
    Setting,
    assert_same,
    largest_change,
    ppo_trainer,
    prompts,
    rollout,
    weights,
    without_critic,
)

POLICY = {"entropy", "ratio", "clip_fraction", "approx_kl", "actor_loss"}
VALUES = {"critic_loss", "value_clip_fraction", "explained_variance", "returns"}
ROLLOUTS = {
    *("reward", "kl", "kl_per_token", "kl_k3", "answer_length", "ended", "ref_nats_per_token"),
    *("advantage_mean", "advantage_std", "kl_coefficient", "actor_updates"),
    *("reward_error", "answer_length_error"),
    *("reward_std", "reward_clipped", "reward_model", "answers", "decode_gap", "decode_gap_max"),
}


def counted(module: torch.nn.Module) -> list[bool]:
    """Whether gradients were on, for each pass of the module from now on."""
    passes: list[bool] = []
    module.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    return passes


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_in_the_warm_up_the_critic_alone_trains(load_roles, lora):
    setting = Setting(lora=lora, ema=EMAConfig(True, 0.5))
    roles = load_roles(setting)
    target = {"kl_target": 0.5, "kl_horizon": 8}
    trainer = ppo_trainer(roles, setting, critic_warmup_iterations=2, ppo_epochs=2, **target)
    first = weights(roles.actor.module)
    average = {name: a.clone() for name, a in roles.ema.shadow.items()}
    for seed in range(2):
        critic = weights(roles.critic.module)
        e = rollout(trainer, seed)
        passes = counted(roles.actor.module)
        statistics = trainer.train_rlhf([e])
        assert passes == []
        assert statistics.keys() == ROLLOUTS | VALUES
        assert statistics["actor_updates"] == 0.0
        assert largest_change(critic, weights(roles.critic.module)) > MOVED
        assert_same(weights(roles.actor.module), first, 0.0)
        assert_same(roles.ema.shadow, average, 0.0)
        assert roles.actor.lr_scheduler.last_epoch == roles.actor.global_steps == 0
        assert trainer.kl.coefficient == 0.1  # an unchanged policy says nothing of it
    statistics = trainer.train_rlhf([rollout(trainer, 2)])
    assert statistics.keys() == ROLLOUTS | VALUES | POLICY
    assert statistics["actor_updates"] == 1.0
    assert largest_change(first, weights(roles.actor.module)) > MOVED
    assert roles.actor.lr_scheduler.last_epoch == roles.actor.global_steps == 2
    assert roles.critic.global_steps == 6
    assert trainer.kl.coefficient == pytest.approx(0.09)


def test_an_update_that_goes_too_far_ends(load_roles):
    """The actor rests, its schedule and the critic go on, the next iteration begins anew."""
    setting = Setting(ema=EMAConfig(True, 0.5), micro_batch=2, accumulation=2)
    roles = load_roles(setting)
    limit = 1e-9
    trainer = ppo_trainer(roles, setting, update_kl_limit=limit, ppo_epochs=4)
    for iteration in range(1, 3):
        e = rollout(trainer, iteration)
        before = weights(roles.actor.module)
        passes = counted(roles.actor.module)
        statistics = trainer.train_rlhf([e])
        # Two micro-batches trained, two that told how far that had gone.
        assert passes == [True, True, False, False]
        assert statistics["actor_updates"] == 0.25
        assert statistics["update_kl"] > limit and statistics["approx_kl"] < FIGURE
        assert statistics["ratio"] == pytest.approx(1.0, abs=NEAR_ONE)  # of the step that was made
        assert largest_change(before, weights(roles.actor.module)) > MOVED
        assert roles.actor.global_steps == iteration
        assert roles.actor.lr_scheduler.last_epoch == 4 * iteration
        assert roles.critic.global_steps == roles.critic.lr_scheduler.last_epoch == 4 * iteration


def test_a_limit_that_is_not_met_changes_nothing(load_roles):
    setting, results = Setting(), []
    for limit in (0.0, 1e6):
        roles = load_roles(setting)
        trainer = ppo_trainer(roles, setting, update_kl_limit=limit, ppo_epochs=3)
        if not results:
            e = rollout(trainer)
        statistics = trainer.train_rlhf([e])
        results.append((weights(roles.actor.module), statistics))
    assert_same(results[0][0], results[1][0], 0.0)
    assert results[1][1].pop("update_kl") > results[1][1]["approx_kl"] > 0  # the last, the mean
    assert results[0][1] == results[1][1]


def test_the_limit_does_not_see_what_is_behind_the_answers(load_roles):
    setting = Setting()
    trainer = ppo_trainer(load_roles(setting), setting, update_kl_limit=1e6, ppo_epochs=2)
    e = rollout(trainer)
    e = dataclasses.replace(e, logprobs=e.logprobs.where(e.answer_mask, -1000.0))
    statistics = trainer.train_rlhf([e])
    assert statistics["actor_updates"] == 1.0 and 0 < statistics["update_kl"] < 10


def test_the_kl_coefficient_follows_its_target(load_roles):
    setting = Setting(learning_rate=1e-2)
    trainer = ppo_trainer(load_roles(setting), setting, kl_target=0.5, kl_horizon=8)
    expected = 0.1
    for seed in range(3):
        statistics = trainer.train_rlhf([rollout(trainer, seed)])
        assert statistics["kl_coefficient"] == pytest.approx(expected, rel=FIGURE)
        # The first rollout has no KL at all. 4 answers are half a horizon.
        error = min(max(statistics["kl"] / 0.5 - 1, -0.2), 0.2)
        assert seed or error == -0.2
        expected *= 1 + error / 2
    trainer.evaluate([prompts()])
    assert trainer.kl.coefficient == pytest.approx(expected, rel=FIGURE)


def test_a_state_holds_all_that_lasts_beyond_an_iteration(load_roles):
    settings = {"critic_warmup_iterations": 1, "kl_target": 0.5, "kl_horizon": 8, "ppo_epochs": 2}
    setting = Setting(micro_batch=1)
    trainer = ppo_trainer(load_roles(setting), setting, **settings)
    for seed in range(2):
        trainer.train_rlhf([rollout(trainer, seed)])
    again = ppo_trainer(trainer.roles, setting, **settings)
    again.load_state_dict(trainer.state_dict())
    assert again.kl.coefficient == trainer.kl.coefficient == pytest.approx(0.09)
    assert again.iterations == 2
    drawn = [torch.randperm(99, generator=t.generator).tolist() for t in (trainer, again)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_without_a_critic_there_are_no_values(load_roles, estimator):
    setting = Setting()
    roles = without_critic(load_roles(setting))
    trainer = ppo_trainer(roles, setting, advantage_estimator=estimator, answers_per_prompt=2)
    e = rollout(trainer)
    assert e.values is None
    e = dataclasses.replace(e, group=torch.tensor([0, 1, 0, 1]))
    before = weights(roles.actor.module)
    assert trainer.train_rlhf([e]).keys() == ROLLOUTS | POLICY | {"frac_reward_zero_std"}
    assert largest_change(before, weights(roles.actor.module)) > MOVED


def test_actor_and_critic_learn_at_rates_of_their_own(folders, distributed):
    """From the command line to the optimizers, LoRA+ ratios included."""
    argv = [
        *("--actor_model_name_or_path", str(folders["llama"].actor)),
        *("--critic_model_name_or_path", str(folders["llama"].critic)),
        *shlex.split("--actor_lora_dim 4 --actor_learning_rate 1e-3 --actor_loraplus_lr_ratio 4"),
        *shlex.split("--critic_lora_dim 2 --critic_learning_rate 2e-4 --critic_zero_stage 2"),
        *shlex.split("--critic_loraplus_lr_ratio 8 --lr_scheduler_type constant --dtype fp32"),
    ]
    setup = parse(RLHFSettings, argv, "").role_setup("fp32", iterations=3)
    roles = DeepSpeedRLHFEngine.load(setup, byte_tokenizer(), distributed)
    actor, critic = group_rates(roles.actor.optimizer), group_rates(roles.critic.optimizer)
    assert actor == pytest.approx({"lora_A": 1e-3, "lora_B": 4e-3})
    assert critic == pytest.approx({"lora_A": 2e-4, "lora_B": 16e-4, "head": 2e-4})
