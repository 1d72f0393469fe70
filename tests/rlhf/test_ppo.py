"""PPO on one process with real engines: tiny folders in, rollouts, updates."""

import pytest
import torch
from slow_ppo import Numbers, SlowPPO, Text
from tiny import byte_tokenizer
from tiny_roles import (
    EPS,
    LORA,
    Setting,
    assert_same,
    largest_change,
    ppo_trainer,
    prompts,
    rollout,
    weights,
)

from dschat.rlhf.experience import Experience
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout import answer_logprobs, answer_values
from dschat.utils.model.model_utils import create_hf_model
from dschat.utils.model.reward_model import create_critic_model, scores_at_end
from dschat.utils.module.lora import LoraConfig

CASES = [
    ("llama", Setting()),
    ("llama", Setting(lora=LORA)),
    ("llama", Setting(lora=LORA, gradient_checkpointing=True)),
    ("llama", Setting(dtype="bf16", gradient_checkpointing=True)),
    ("llama", Setting(dtype="bf16", lora=LORA, micro_batch=2, accumulation=2)),
    ("opt", Setting(lora=LORA)),
    ("opt", Setting(gradient_checkpointing=True)),
    ("gpt2", Setting(lora=LORA, dtype="bf16")),
]


@pytest.mark.parametrize("family, setting", CASES)
def test_on_fresh_experience_the_ratio_is_one(load_roles, family, setting):
    """The folders ask for dropout 0.5 and so do the adapters; training mode must not notice.

    The second round counts: only then is B no longer zero, so that adapters do something.
    """
    roles = load_roles(setting, family)
    trainer = ppo_trainer(roles, setting)
    for seed in range(2):
        before = weights(roles.actor.module)
        e = rollout(trainer, seed)
        roles.train()
        assert roles.actor.module.training
        logprobs, _ = answer_logprobs(roles.actor, e.sequences, e.attention_mask, 6)
        values = answer_values(roles.critic, e.sequences, e.attention_mask, 6)
        for now, old in ((logprobs, e.logprobs), (values * e.answer_mask, e.values)):
            torch.testing.assert_close(now.detach(), old, atol=1e-6, rtol=0)
        statistics = trainer.train_rlhf([e])
        assert statistics["ratio"] == pytest.approx(1.0, abs=1e-6)
        assert statistics["approx_kl"] == pytest.approx(0.0, abs=1e-9)
        assert largest_change(before, weights(roles.actor.module)) > 1e-4
        if setting.accumulation == 1:  # one step: nothing has moved before the last ratio
            assert statistics["clip_fraction"] == 0.0
    assert statistics["kl_k3"] > 0  # the policy has left the reference


@pytest.mark.parametrize(
    "setting",
    [
        Setting(lora=LORA),
        Setting(lora=LORA, gradient_checkpointing=True, dtype="bf16"),
        Setting(lora=LORA, train_base=True),
        Setting(),
        Setting(dtype="bf16"),
        Setting(lora=LORA, share_trunk="none", dtype="bf16"),
        Setting(offload_frozen=True),
    ],
)
def test_reference_and_reward_are_the_loaded_folders_and_stay_so(load_roles, folders, setting):
    """Two trunks or four: bit for bit the numbers of models that nothing ever trains."""
    roles = load_roles(setting)
    shared = setting.lora is not None and not setting.train_base and setting.share_trunk != "none"
    assert (roles.reference is None) == (roles.reward is None) == shared
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setting.dtype]
    tokenizer = byte_tokenizer()
    reference = create_hf_model(str(folders["llama"].actor), tokenizer, dtype).eval()
    reward = create_critic_model(str(folders["llama"].critic), tokenizer, dtype).eval()
    trainer = ppo_trainer(roles, setting)
    for seed in range(3):
        e = rollout(trainer, seed)
        with torch.no_grad():
            text = e.sequences, e.attention_mask
            expected, _ = answer_logprobs(reference, *text, 6)
            scores = scores_at_end(reward(*text), e.attention_mask)
        assert torch.equal(e.ref_logprobs, expected)
        assert torch.equal(e.scores, scores)
        assert torch.equal(e.logprobs, e.ref_logprobs) == (seed == 0)
        trainer.train_rlhf([e])
    # The critic, which began as the reward model, has moved on.
    final = answer_values(roles.critic, *text, 6)
    first = answer_values(reward, *text, 6)
    assert (final - first).abs().max() > 1e-2


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_update_does_not_depend_on_the_micro_batch(load_roles, lora):
    results = []
    for micro_batch in (4, 2, 1):
        setting = Setting(lora=lora, micro_batch=micro_batch, accumulation=4 // micro_batch)
        roles = load_roles(setting)
        trainer = ppo_trainer(roles, setting, ppo_epochs=2)
        if not results:
            first = rollout(trainer)
        statistics = trainer.train_rlhf([first])
        results.append((weights(roles.actor.module), weights(roles.critic.module), statistics))
    for actor, critic, statistics in results[1:]:
        assert_same(actor, results[0][0], 1e-6)
        assert_same(critic, results[0][1], 1e-6)
        assert statistics == pytest.approx(results[0][2], abs=1e-5)


def text_of(e: Experience, row: int) -> Text:
    """The ids alone of one row, as the slow reference takes them."""
    prompt = int(e.attention_mask[row, : e.prompt_length].sum())
    return Text(e.sequences[row][e.attention_mask[row]], prompt, bool(e.ended[row]))


def test_updates_equal_those_of_plain_pytorch(load_roles, folders):
    """Two rounds of rollout and two epochs, all coefficients away from their defaults."""
    setting = Setting()
    changes = {
        "kl_coefficient": 0.7,
        "clip_range": 0.02,
        "value_clip_range": 0.05,
        "gamma": 0.97,
        "lam": 0.9,
        "reward_clip": 0.4,
        "missing_eos_penalty": 0.6,
        "ppo_epochs": 3,
    }
    numbers = Numbers(
        kl=0.7,
        clip=0.02,
        value_clip=0.05,
        gamma=0.97,
        lam=0.9,
        reward_clip=0.4,
        missing_eos_penalty=0.6,
        epochs=3,
        learning_rate=setting.learning_rate,
        eps=EPS,
        max_norm=setting.clipping,
    )
    roles = load_roles(setting)
    trainer, slow = ppo_trainer(roles, setting, **changes), SlowPPO(folders["llama"], numbers)
    before = weights(roles.actor.module)
    for seed in range(2):
        e = rollout(trainer, seed)
        assert (e.scores.abs() > 0.4).any() and not e.ended.all()
        statistics = trainer.train_rlhf([e])
        assert 0 < statistics["clip_fraction"] < 1
        slow.update([text_of(e, row) for row in range(4)])
    assert largest_change(before, weights(roles.actor.module)) > 3e-3

    expected = {name: p.detach().float() for name, p in slow.actor.named_parameters()}
    assert_same(weights(roles.actor.module), expected, 1e-6)
    critic = {
        name.replace("rwtransformer.", "model.").replace("v_head", "score"): p
        for name, p in weights(roles.critic.module).items()
    }
    expected = {name: p.detach().float() for name, p in slow.critic.named_parameters()}
    assert_same(critic, expected, 1e-6)


def low_bytes(roles: DeepSpeedRLHFEngine, sequences: torch.Tensor, mask: torch.Tensor, _: int):
    """A reward that can be read off the text: the share of low token ids in the last 2 places."""
    return (sequences[:, -2:] < 132).float().mean(-1)


@pytest.mark.parametrize(
    "lora, rate, iterations",
    [
        (None, 2e-2, 6),
        (LoraConfig(8, module_names=("lm_head", "q_proj")), 1e-2, 10),
    ],
    ids=["full", "lora"],
)
def test_ppo_raises_a_reward(load_roles, monkeypatch, lora, rate, iterations):
    setting = Setting(lora=lora, learning_rate=rate, eps=1e-8, micro_batch=64)
    monkeypatch.setattr(DeepSpeedRLHFEngine, "reward_scores", low_bytes)
    trainer = ppo_trainer(
        load_roles(setting),
        setting,
        answer=2,
        rollout_batch_size=64,
        ppo_epochs=4,
        kl_coefficient=0.0,
        value_clip_range=10.0,
    )
    torch.manual_seed(3)
    steps = [trainer.train_rlhf([trainer.rollout(prompts(64))]) for _ in range(iterations)]
    rewards = [step["reward"] for step in steps]
    assert rewards[0] < 0.6  # about half of all tokens
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.15, rewards
