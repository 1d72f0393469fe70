"""What the log of a PPO run counts as work."""

import pytest
import torch

from dschat.rlhf import ppo_log
from dschat.rlhf.ppo_log import PPOLog
from dschat.train.metrics import LogConfig, MetricLogger
from dschat.utils.perf import Gpus
from tests.rlhf.tiny_roles import LORA, Setting, ppo_trainer, prompts


@pytest.mark.parametrize(
    ("changes", "passes", "ended"),
    [
        ({}, 2, 1.0),
        ({"critic_warmup_iterations": 1}, 0, 0.1),
        ({"update_kl_limit": 1e-9}, 1, 0.0),  # the second epoch's steps are left out
    ],
)
def test_throughput_counts_the_steps_that_the_actor_made(
    load_roles, monkeypatch, capsys, changes, passes, ended
):
    works = []
    monkeypatch.setattr(ppo_log, "print_throughput_step3", lambda *args: works.append(args[:2]))
    setting = Setting(lora=LORA)
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting, ppo_epochs=2, **changes)
    configs = {name: setting.role(name).config for name in roles.trained}
    gpus = Gpus(1, torch.float32)
    metrics = MetricLogger(LogConfig(), None, rank=0)
    log = PPOLog(metrics, 0, roles, configs, gpus, iterations=1)
    log.begin()
    torch.manual_seed(0)
    experiences = trainer.rollout([prompts()])
    log.rolled_out()
    log.iteration(1, trainer.train_rlhf(experiences) | {"ended": ended}, experiences, ppo_epochs=2)
    log.close()
    out = capsys.readouterr().out
    assert ("note: no answer of the first" in out) == (ended == 0)
    assert ("raise max_answer_seq_len where step 2's answers are longer, or" in out) == (ended == 0)
    ((actor, critic),) = works
    assert (actor.samples, critic.samples) == (4 * passes, 8)
    assert 2 * actor.tokens == passes * critic.tokens
