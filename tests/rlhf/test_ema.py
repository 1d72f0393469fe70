"""The moving average on one process; `test_ppo_ranks.py` has it on two, sharded."""

import pytest
import torch

from dschat.rlhf.part_config import EMAConfig
from tests.helpers.rounding import MOVED, ROUNDING
from tests.rlhf.tiny_roles import (
    FULL,
    LORA,
    Setting,
    assert_same,
    largest_change,
    ppo_trainer,
    rollout,
    weights,
)


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_ema_follows_real_steps_in_fp32(load_roles, lora):
    setting = Setting(lora=lora, ema=EMAConfig(True, 0.75), dtype="bf16")
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting, ppo_epochs=1)
    start = weights(roles.actor.module)
    expected = {
        n: start[n].float() for n, p in roles.actor.module.named_parameters() if p.requires_grad
    }
    for seed in range(2):
        trainer.train_rlhf([rollout(trainer, seed)])
        now = weights(roles.actor.module)
        expected = {n: 0.75 * old + 0.25 * now[n].float() for n, old in expected.items()}
    assert all(average.dtype == torch.float32 for average in roles.ema.shadow.values())
    # Two steps of three roundings here and there, of weights below 1.
    assert_same(roles.ema.shadow, expected, 12 * ROUNDING)

    live = weights(roles.actor.module)
    with roles.ema.applied() as module:
        inside = weights(module)
    assert_same(inside, {n: expected.get(n, live[n]).to(live[n]) for n in live}, 1e-2)
    assert largest_change(inside, live) > MOVED
    after = weights(roles.actor.module)
    assert all(torch.equal(after[name], live[name]) for name in live)
    with pytest.raises(KeyboardInterrupt), roles.ema.applied():
        raise KeyboardInterrupt
    after = weights(roles.actor.module)
    assert all(torch.equal(after[name], live[name]) for name in live)


def test_ema_stays_where_a_step_was_skipped(load_roles, monkeypatch):
    setting = Setting(ema=EMAConfig(True, 0.5))
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting)
    e = rollout(trainer)
    before = {name: average.clone() for name, average in roles.ema.shadow.items()}
    # What an fp16 overflow leaves behind.
    monkeypatch.setattr(roles.actor, "was_step_applied", lambda: False)
    monkeypatch.setattr(roles.actor, "fp16_enabled", lambda: True)
    trainer.train_rlhf([e])
    assert all(torch.equal(roles.ema.shadow[name], before[name]) for name in before)
    monkeypatch.undo()
    trainer.train_rlhf([e])
    assert any(not torch.equal(roles.ema.shadow[name], before[name]) for name in before)
