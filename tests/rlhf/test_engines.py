"""Which engine a run gets, and the line that says so."""

import pytest

from dschat.config import RLHFSettings
from dschat.errors import UserError
from dschat.rlhf import engines
from dschat.rlhf.engines import choose_engine
from dschat.rlhf.rollout_engine import TransformersRollout
from dschat.rlhf.static_rollout import StaticRollout
from dschat.utils.zero import full_shape
from tests.helpers.adapters import ALONE
from tests.rlhf.tiny_roles import LORA, Setting

GIVEN = {"actor_model_name_or_path": "a", "critic_model_name_or_path": "c", "actor_lora_dim": 4}
GIVEN |= {"per_device_generation_batch_size": 3, "answers_per_prompt": 2}


def settings(**given: object) -> RLHFSettings:
    return RLHFSettings.of(**GIVEN, **given)


def test_the_default_is_the_static_engine_with_small_adapters_fused(load_roles, capsys):
    roles = load_roles(Setting(lora=LORA))
    roles.train()
    capsys.readouterr()
    engine = choose_engine(settings(), roles, roles.tokenizer, ALONE)
    assert isinstance(engine, StaticRollout) and engine.rows == 6 and engine.fuse_adapters
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith(
        "rollouts: static cache, recorded steps, adapters fused with the weights"
    )
    assert roles.actor.module.training  # the proof leaves it as it was


def test_in_bf16_adapters_stay_adapters_unless_asked_for(load_roles, monkeypatch):
    roles = load_roles(Setting(lora=LORA, dtype="bf16"))
    assert not choose_engine(settings(), roles, roles.tokenizer, ALONE).fuse_adapters
    asked = settings(fuse_lora_for_generation=True)
    assert choose_engine(asked, roles, roles.tokenizer, ALONE).fuse_adapters
    roles = load_roles(Setting(lora=LORA))
    monkeypatch.setattr(engines, "SMALL_COPY", 1000)  # too large a copy
    assert not choose_engine(settings(), roles, roles.tokenizer, ALONE).fuse_adapters


def test_a_model_that_fails_the_proof_is_generated_by_transformers(load_roles, monkeypatch, capsys):
    roles = load_roles(Setting(lora=LORA))
    monkeypatch.setattr(engines, "disproof", lambda *_: "it takes no position_ids")
    capsys.readouterr()
    assert isinstance(choose_engine(settings(), roles, roles.tokenizer, ALONE), TransformersRollout)
    said = "rollouts: generate of transformers; no static cache: it takes no position_ids\n"
    assert capsys.readouterr().out == said
    with pytest.raises(UserError, match="rollout_engine static: it takes no position_ids; use"):
        choose_engine(settings(rollout_engine="static"), roles, roles.tokenizer, ALONE)


def test_shards_that_a_pass_has_just_left_whole_are_shards(load_roles, capsys):
    """Small weights stay on every rank after a pass, until the next update lets them go."""
    roles = load_roles(Setting(lora=LORA, zero_stage=3))
    assert all(p.shape == full_shape(p) for p in roles.actor.module.parameters())
    capsys.readouterr()
    assert isinstance(choose_engine(settings(), roles, roles.tokenizer, ALONE), TransformersRollout)
    assert "no static cache: ZeRO-3 holds its weights in shards" in capsys.readouterr().out


def test_generate_is_as_before(load_roles, capsys):
    roles = load_roles(Setting(lora=LORA))
    capsys.readouterr()
    engine = choose_engine(settings(rollout_engine="generate"), roles, roles.tokenizer, ALONE)
    assert engine == TransformersRollout(roles.actor, roles.tokenizer)
    assert capsys.readouterr().out == ""


def test_weights_are_gathered_at_zero_3_alone():
    with pytest.raises(UserError, match="gather_for_rollouts: at actor_zero_stage 2 every rank"):
        settings(gather_for_rollouts=True, actor_zero_stage=2)
    assert settings(gather_for_rollouts=True, actor_zero_stage=3).rollouts.gather_for_rollouts
