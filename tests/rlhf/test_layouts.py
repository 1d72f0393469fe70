"""One trunk, two or four: the same numbers, fewer weights, the same folders at the end."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dschat.errors import UserError
from dschat.models.causal_lm import create_hf_model
from dschat.models.save import save_hf_format
from dschat.rlhf.one_trunk import check_one_trunk
from dschat.rlhf.part_config import EMAConfig
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.utils.module.lora import fused_adapters
from tests.helpers.adapters import ALONE, plan, with_adapter
from tests.helpers.rounding import LOGITS, MOVED
from tests.helpers.tiny import byte_tokenizer
from tests.rlhf.one_base import SFT_LORA, save_one_base
from tests.rlhf.tiny_roles import (
    LORA,
    Setting,
    assert_same,
    assert_trained_alike,
    largest_change,
    ppo_trainer,
    rollout,
    weights,
)

LAYOUTS = ("none", "auto", "all")
PARTS = ("logprobs", "ref_logprobs", "values", "model_scores")
# On some layers alone: the others keep what the folder's adapter does, and train nothing.
FEW = replace(LORA, lora_module_name=("q_proj", "c_attn", "fc1"), lora_dropout=0.0)


@pytest.fixture(scope="session")
def one_base(tmp_path_factory):
    """Folders of a family, made once."""
    made = {}

    def folders(family="llama"):
        if family not in made:
            made[family] = save_one_base(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folders


def trained_weights(roles: DeepSpeedRLHFEngine) -> dict[str, torch.Tensor]:
    return {
        f"{role}.{name}": p.detach().clone()
        for role, engine in roles.trained.items()
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


def distinct_weights(roles: DeepSpeedRLHFEngine) -> int:
    """Elements of all roles together, each parameter once."""
    modules = [*(e.module for e in roles.trained.values()), roles.reference, roles.reward]
    parameters = {id(p): p for m in modules if m is not None for p in m.parameters()}
    return sum(p.numel() for p in parameters.values())


@pytest.mark.parametrize(
    "family, lora", [("llama", LORA), ("llama", FEW), ("gpt2", FEW), ("opt", LORA)]
)
def test_layouts_agree(one_base, distributed, family, lora):
    """Rollouts and two rounds of updates, from adapter folders."""
    results = []
    for layout in LAYOUTS:
        setting = Setting(lora=lora, share_trunk=layout, learning_rate=3e-4)
        roles = setting.load(one_base(family), distributed)
        trainer = ppo_trainer(roles, setting, ppo_epochs=2)
        started = trained_weights(roles)
        first = rollout(trainer)
        trainer.train_rlhf([first])
        second = rollout(trainer, seed=1)
        trainer.train_rlhf([second])
        results.append((started, (first, second), trained_weights(roles)))
    for started, experiences, ended in results:
        assert largest_change(started, ended) > MOVED
        for found, expected in zip(experiences, results[0][1], strict=True):
            assert torch.equal(found.sequences, expected.sequences)
            for part in PARTS:
                torch.testing.assert_close(
                    getattr(found, part), getattr(expected, part), atol=LOGITS, rtol=0
                )
        names = started.keys() & results[0][0].keys()  # four trunks keep no second head
        assert len(names) > 5
        assert_same({n: started[n] for n in names}, results[0][0], 0.0)
        assert_trained_alike({n: ended[n] for n in names}, results[0][2], setting, steps=4)


def test_weights_are_there_once(one_base, distributed):
    sizes = {}
    for layout in LAYOUTS:
        roles = Setting(lora=FEW, share_trunk=layout).load(one_base(), distributed)
        sizes[layout] = distinct_weights(roles)
    base = sum(p.numel() for p in plain(one_base()).parameters())
    head = base - sum(p.numel() for p in plain(one_base()).base_model.parameters())
    assert 3.9 * base < sizes["none"] + 2 * head < 4.2 * base
    assert 1.9 * base < sizes["auto"] + head < 2.1 * base
    assert base < sizes["all"] < 1.2 * base
    critic = roles.critic.module.rwtransformer.layers[0].self_attn
    actor = roles.actor.module.model.layers[0].self_attn
    assert critic.q_proj.weight is actor.q_proj.weight
    assert critic.q_proj.lora_A is not actor.q_proj.lora_A


def plain(folders) -> nn.Module:
    """The base as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folders.actor.parent / "base")


@pytest.mark.parametrize("family, lora", [("llama", FEW), ("gpt2", LORA), ("llama-tied", FEW)])
def test_one_trunk_trains_no_weight_and_saves_what_it_computes(
    one_base, distributed, tmp_path, family, lora
):
    setting = Setting(lora=lora, share_trunk="all", ema=EMAConfig(True, 0.5))
    roles = setting.load(one_base(family), distributed)
    trainer = ppo_trainer(roles, setting)
    before = weights(roles.actor.module)
    trainer.train_rlhf([rollout(trainer)])
    frozen = {n: p for n, p in roles.actor.module.named_parameters() if not p.requires_grad}
    assert_same({n: before[n] for n in frozen}, {n: p.detach() for n, p in frozen.items()}, 0.0)
    e = rollout(trainer, seed=1)
    inputs = {"input_ids": e.sequences, "attention_mask": e.attention_mask.long()}
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    kinds = (AutoModelForCausalLM, AutoModelForSequenceClassification)
    with torch.no_grad(), roles.ema.applied():
        for (name, engine), kind in zip(roles.trained.items(), kinds, strict=True):
            save_hf_format(engine, byte_tokenizer(), tmp_path / name, ALONE)
            saved, info = kind.from_pretrained(tmp_path / name, output_loading_info=True)
            assert not any(info[k] for k in ("missing_keys", "unexpected_keys"))
            if name == "actor":
                live, found = engine(**inputs, use_cache=False).logits, saved(**inputs).logits
            else:
                live = engine(e.sequences, e.attention_mask)
                found = saved.score(saved.base_model(**inputs)[0]).squeeze(-1)
            mask = e.attention_mask
            torch.testing.assert_close(found[mask], live[mask], atol=LOGITS, rtol=0)


def test_fused_adapters_leave_the_folders_own_in_place(one_base, distributed):
    roles = Setting(lora=FEW, share_trunk="all").load(one_base(), distributed)
    trainer = ppo_trainer(roles, Setting(lora=FEW))
    trainer.train_rlhf([rollout(trainer)])
    ids = torch.arange(3, 23).view(2, 10)
    before = weights(roles.actor.module)
    with torch.no_grad():
        apart = roles.actor(input_ids=ids).logits
        with fused_adapters(roles.actor.module):
            fused = roles.actor(input_ids=ids).logits
    torch.testing.assert_close(fused, apart, atol=LOGITS, rtol=0)
    assert_same(before, weights(roles.actor.module), 0.0)


def test_adapters_may_lie_on_adapters(one_base, distributed, tmp_path):
    """The actor's folder is an adapter on the SFT adapter: the order of addition is the chain's."""
    folders = one_base()
    tokenizer, out = byte_tokenizer(), tmp_path / "second"
    model = with_adapter(create_hf_model(str(folders.actor), tokenizer, torch.float32), SFT_LORA, 9)
    base = str(folders.actor.parent / "base")
    save_hf_format(model, tokenizer, out, ALONE, plan("adapter", base, SFT_LORA, out))
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folders.actor)
    (out / "adapter_config.json").write_text(json.dumps(config))
    chained = replace(folders, actor=out)
    results = []
    for layout in ("none", "all"):
        roles = Setting(lora=LORA, share_trunk=layout).load(chained, distributed)
        results.append(rollout(ppo_trainer(roles, Setting(lora=LORA))))
    for part in PARTS:
        one, other = (getattr(e, part) for e in results)
        torch.testing.assert_close(one, other, atol=LOGITS, rtol=0)


def test_two_bases_are_refused(one_base, folders):
    critic = str(folders["llama"].critic)
    with pytest.raises(UserError, match=r"share_trunk all: .*critic is on the base .*/base; train"):
        check_one_trunk([str(one_base().actor), critic])
