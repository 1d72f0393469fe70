"""PPO on one process with real engines: tiny folders in, rollouts, updates."""

import pytest
import torch

from dschat.models.causal_lm import create_hf_model
from dschat.models.logprobs import answer_logprobs
from dschat.models.reward_model import create_critic_model, scores_at_end
from dschat.rlhf.experience import in_micro_batches
from dschat.rlhf.rollout import answer_values
from tests.helpers.rounding import DIFFERENT, FIGURE, LOGITS, MOVED, NEAR_ONE
from tests.helpers.tiny import byte_tokenizer
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

CASES = [
    ("llama", Setting()),
    ("llama", Setting(lora=LORA)),
    ("llama", Setting(lora=LORA, gradient_checkpointing=True)),
    ("llama", Setting(dtype="bf16", gradient_checkpointing=True)),
    ("llama", Setting(dtype="bf16", lora=LORA, micro_batch=2, accumulation=2)),
    ("opt", Setting(lora=LORA)),
    ("opt", Setting(gradient_checkpointing=True)),
    ("gpt2", Setting(lora=LORA, dtype="bf16")),
    ("falcon", Setting(gradient_checkpointing=True)),
    ("falcon", Setting(lora=LORA)),
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
        sizes = setting.micro_batch, setting.accumulation
        for part in in_micro_batches([e], *sizes, trainer.generator, is_first=True):
            text = part.sequences, part.attention_mask, part.answer_mask.shape[1]
            logprobs = answer_logprobs(roles.actor, *text).logprobs
            values = answer_values(roles.critic, *text)
            for now, old in ((logprobs, part.logprobs), (values * part.answer_mask, part.values)):
                torch.testing.assert_close(now.detach(), old, atol=NEAR_ONE, rtol=0)
        statistics = trainer.train_rlhf([e])
        assert statistics["ratio"] == pytest.approx(1.0, abs=NEAR_ONE)
        assert statistics["approx_kl"] == pytest.approx(0.0, abs=FIGURE)
        assert largest_change(before, weights(roles.actor.module)) > MOVED
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
    shared = setting.lora.lora_dim and not setting.train_base and setting.share_trunk != "none"
    assert (roles.reference is None) == (roles.reward is None) == bool(shared)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setting.dtype]
    tokenizer = byte_tokenizer()
    reference = create_hf_model(str(folders["llama"].actor), tokenizer, dtype).eval()
    reward = create_critic_model(str(folders["llama"].critic), tokenizer, dtype).eval()
    trainer = ppo_trainer(roles, setting)
    for seed in range(3):
        e = rollout(trainer, seed)
        with torch.no_grad():
            text = e.sequences, e.attention_mask
            expected = answer_logprobs(reference, *text, 6).logprobs
            scores = scores_at_end(reward(*text), e.attention_mask)
        assert torch.equal(e.ref_logprobs, expected)
        assert torch.equal(e.model_scores, scores)
        assert torch.equal(e.logprobs, e.ref_logprobs) == (seed == 0)
        trainer.train_rlhf([e])
    # The critic, which began as the reward model, has moved on.
    final = answer_values(roles.critic, *text, 6)
    first = answer_values(reward, *text, 6)
    assert (final - first).abs().max() > DIFFERENT


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
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
        assert statistics == pytest.approx(results[0][2], abs=LOGITS)
