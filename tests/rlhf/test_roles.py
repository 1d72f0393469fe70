"""Which roles are there, where their weights come from, and where they live."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dschat.models.reward_model import create_critic_model, scores_at_end
from dschat.models.reward_statistics import RewardStatistics
from dschat.models.save import save_hf_format
from dschat.rlhf import rlhf_engine
from dschat.rlhf.experience import Experience
from dschat.rlhf.one_trunk import SeparateTrunks
from dschat.rlhf.rlhf_engine import on_device
from dschat.utils.distributed import Distributed
from tests.helpers.adapters import ALONE
from tests.helpers.launch import run_ranks
from tests.helpers.rounding import DIFFERENT, MOVED, NEAR_ONE, ROUNDING
from tests.helpers.tiny import byte_tokenizer
from tests.rlhf.one_base import save_one_base
from tests.rlhf.roles_worker import one_trunk, trained
from tests.rlhf.tiny_roles import (
    FULL,
    LORA,
    Folders,
    Setting,
    assert_same,
    assert_trained_alike,
    ppo_trainer,
    prompts,
    rollout,
    save_folders,
)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A reward model of other weights than the critic's."""
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(11)
    critic = save_folders(folder).critic
    model = create_critic_model(str(critic), byte_tokenizer(), torch.float32)
    with torch.no_grad():
        model.v_head.weight.mul_(-1)
    save_hf_format(model, byte_tokenizer(), folder / "reward", ALONE)
    return folder / "reward"


def expected_scores(folder: Path, batch) -> torch.Tensor:
    model = create_critic_model(str(folder), byte_tokenizer(), torch.float32).eval()
    with torch.no_grad():
        return scores_at_end(model(batch.input_ids, batch.attention_mask), batch.attention_mask)


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_reward_model_of_its_own_folder(folders, distributed, other, lora, offload):
    setting, batch = Setting(lora=lora, offload_frozen=offload), prompts()
    roles = setting.load(folders["llama"], distributed, reward=setting.frozen(other))
    expected = expected_scores(other, batch)
    for _ in range(2):
        scores = roles.reward_scores(batch.input_ids, batch.attention_mask, 3)
        assert torch.equal(scores, expected)
        trainer = ppo_trainer(roles, setting)
        trainer.train_rlhf([rollout(trainer)])
    assert (expected - expected_scores(folders["llama"].critic, batch)).abs().min() > DIFFERENT


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_values_start_in_the_units_of_scaled_scores(folders, distributed, lora):
    """(score - 5) / 2, in rollouts and in training; the scores themselves are scaled elsewhere."""
    setting, scaling = Setting(lora=lora), RewardStatistics(5.0, 2.0, 8, "rows")
    trainers = [
        ppo_trainer(setting.load(folders["llama"], distributed, scaling=s), setting)
        for s in (None, scaling)
    ]
    plain, scaled = (rollout(trainer) for trainer in trainers)
    assert torch.equal(scaled.model_scores, plain.model_scores)
    mask = plain.answer_mask
    torch.testing.assert_close(scaled.values[mask], (plain.values[mask] - 5.0) / 2.0)
    # The first pass sees the values of the rollout: the error is that of the returns.
    e = scaled.with_returns(torch.zeros_like(scaled.values), scaled.values + 0.1)
    loss, _ = trainers[1].updates.critic_loss(trainers[1].roles.critic, e)
    # A value below 4 and the return beside it are rounded; the square has their 0.1 twice.
    rounded = 2 * 2 * 4 * ROUNDING / 0.1
    assert loss.item() == pytest.approx(0.5 * 0.1**2 * mask.sum().item(), rel=rounded)


def test_values_of_another_start_are_not_scaled(folders, other):
    setup = replace(
        Setting().role_setup(folders["llama"]), scaling=RewardStatistics(5.0, 2.0, 8, "rows")
    )
    assert setup.value_scaling is setup.scaling
    fresh = replace(setup.critic, fresh_head=True)
    assert replace(setup, critic=fresh).value_scaling is None
    assert replace(setup, reward=Setting().frozen(other)).value_scaling is None
    assert replace(setup, critic=None).value_scaling is None


def test_values_of_a_trained_critic_keep_their_scaling(folders, other):
    own = RewardStatistics(1.0, 3.0, 4, "rows")
    setup = Setting().role_setup(folders["llama"])
    critic = replace(setup.critic, value_scaling=own)
    setup = replace(setup, critic=critic, reward=Setting().frozen(other))
    assert setup.value_scaling is None  # scores are not scaled either
    assert replace(setup, scaling=RewardStatistics(5.0, 2.0, 8, "rows")).value_scaling is own


@pytest.mark.parametrize("layout", ["auto", "none"])
def test_without_a_critic_the_reward_model_is_a_copy(folders, distributed, layout):
    setting, batch = Setting(lora=LORA, share_trunk=layout), prompts()
    roles = setting.load(folders["llama"], distributed, critic=None)
    assert roles.critic is None and [*roles.trained] == ["actor"] and roles.has_reward_model
    assert roles.train().actor.module.training and not roles.eval().actor.module.training
    assert not any(p.requires_grad for p in roles.reward.parameters())
    scores = roles.reward_scores(batch.input_ids, batch.attention_mask, 3)
    assert torch.equal(scores, expected_scores(folders["llama"].critic, batch))


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_without_a_reward_model_none_is_kept(folders, distributed, lora):
    roles = Setting(lora=lora).load(folders["llama"], distributed, reward=None)
    assert roles.reward is None and not roles.has_reward_model
    assert roles.critic.module.reward_head is None


def headless(setting: Setting, folders, distributed: Distributed):
    """A critic from the actor's folder, with a fresh head."""
    critic = replace(setting.role(folders.actor), fresh_head=True)
    return setting.load(folders, distributed, critic=critic)


def test_a_fresh_head_on_a_language_model(folders, distributed):
    """The same head at every start, on the language model's trunk; another gives rewards."""
    setting = Setting(lora=LORA)
    heads = [headless(setting, folders["llama"], distributed).critic for _ in range(2)]
    first, second = (c.module.v_head.weight.detach() for c in heads)
    assert torch.equal(first, second) and first.abs().min() > 0
    roles = headless(setting, folders["llama"], distributed)
    assert roles.reward is not None and roles.critic.module.reward_head is None
    actor = {n: p for n, p in roles.actor.module.model.named_parameters() if "lora" not in n}
    trunk = roles.critic.module.rwtransformer
    assert_same(actor, {n: p for n, p in trunk.named_parameters() if "lora" not in n}, 0.0)
    trainer = ppo_trainer(roles, setting)
    trainer.train_rlhf([rollout(trainer)])
    assert (roles.critic.module.v_head.weight - first).abs().max() > MOVED


@pytest.fixture(scope="module")
def on_two_ranks(folders, distributed, tmp_path_factory) -> tuple[Folders, Experience, dict]:
    out = tmp_path_factory.mktemp("two")
    one_base, setting = save_one_base(out / "base"), one_trunk(0, micro_batch=4)
    e = rollout(ppo_trainer(setting.load(one_base, distributed), setting))
    torch.save(e.__getstate__(), out / "rollout.pt")
    places = [folders["llama"].actor.parent, one_base.actor.parent, out / "rollout.pt", out]
    worker = Path(__file__).with_name("roles_worker.py")
    run_ranks(worker, 2, [str(place) for place in places], log_dir=out)
    return one_base, e, torch.load(out / "results.pt")


@pytest.mark.slow
def test_on_two_ranks_a_fresh_head_is_one(folders, distributed, on_two_ranks):
    """In shards of two ranks the same head as on one."""
    expected = headless(Setting(), folders["llama"], distributed).critic.module.v_head.weight
    assert torch.equal(on_two_ranks[2]["head"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_one_trunk_on_two_ranks_trains_as_on_one(on_two_ranks, distributed, stage):
    one_base, e, found = on_two_ranks
    setting = one_trunk(0, micro_batch=4)
    expected = trained(setting, one_base, distributed, e)
    assert len(expected) > 20
    assert_trained_alike(found[stage], expected, setting, steps=2)


def test_offloaded_weights_come_for_a_pass_and_cost_no_way_back():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    home = {name: t.data_ptr() for name, t in module.state_dict().items()}
    other = torch.device("cpu", 0)  # not equal to what the tensors say of themselves
    x = torch.randn(4, 3)
    expected = module.eval()(x)
    for error in (None, ValueError):
        with contextlib.suppress(ValueError), on_device(module, other) as inside:
            away = {name: t.data_ptr() for name, t in inside.state_dict().items()}
            assert torch.equal(inside(x), expected)
            if error is not None:
                raise error
        assert not {*away.values()} & {*home.values()}
        assert {name: t.data_ptr() for name, t in module.state_dict().items()} == home


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_copies_in_shards_stay_on_the_cpu(folders, distributed, monkeypatch, offload):
    """DeepSpeed keeps shards where `remote_device` says: the device's own memory, or the CPU's."""
    from deepspeed.runtime.zero.partition_parameters import Init

    places, setting = [], Setting(zero_stage=3, offload_frozen=offload)
    partition = Init._partition_param

    def noted(self, param, *args, **kwargs):
        if param.ds_tensor is None:  # a first cut, into a shard that will stay
            places.append(self.remote_device)
        return partition(self, param, *args, **kwargs)

    folder = folders["llama"].critic
    monkeypatch.setattr(Init, "_partition_param", noted)
    models = SeparateTrunks(byte_tokenizer(), torch.float32)
    copy = rlhf_engine._frozen(setting.frozen(folder), "value", models, distributed)
    assert len(places) >= len([*copy.parameters()])
    assert {isinstance(place, torch.device) for place in places} == {not offload}
    assert {str(place) for place in places} == {"cpu"}  # offloaded by name, else as the device
    batch = prompts()
    with torch.no_grad():
        values = copy(batch.input_ids, batch.attention_mask)
    scores = scores_at_end(values, batch.attention_mask)
    torch.testing.assert_close(scores, expected_scores(folder, batch), atol=NEAR_ONE, rtol=0)
