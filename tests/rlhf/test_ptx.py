"""Language modelling mixed into the actor's steps, against plain PyTorch and on two ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dschat.functional.returns import identity
from dschat.rlhf.advantages import whitened, with_advantages
from dschat.rlhf.experience import Experience
from dschat.rlhf.ptx import PTX, BlockOrder
from tests.helpers.launch import run_ranks
from tests.helpers.rounding import DIFFERENT, GRADIENTS, LOGITS, NEAR_ONE
from tests.rlhf.ptx_worker import BLOCKS, CELLS, COEFFICIENT, LENGTH, SEED, blocks, mix_in, train
from tests.rlhf.tiny_roles import (
    LORA,
    Folders,
    Setting,
    assert_trained_alike,
    end_after,
    ppo_trainer,
    prompts,
)


@pytest.fixture(scope="module")
def rollout(folders, distributed, tmp_path_factory) -> Path:
    """Four rows sampled by one process: answers of several lengths, one row of filler."""
    setting = Setting()
    roles = setting.load(folders["llama"], distributed)
    torch.manual_seed(0)
    hook = end_after(roles.actor.module, [2, 6, None, 2])
    (e,) = ppo_trainer(roles, setting).rollout([prompts(3)])
    hook.remove()
    path = tmp_path_factory.mktemp("rollout") / "rollout.pt"
    torch.save(e.__getstate__(), path)
    return path


def test_blocks_without_end():
    order = BlockOrder(5, seed=1)
    passes = [[order[5 * epoch + i] for i in range(5)] for epoch in range(3)]
    assert all(sorted(p) == [0, 1, 2, 3, 4] for p in passes)
    assert passes[0] != passes[1] != passes[2]
    assert [order[i] for i in range(5)] == passes[0]  # the way back
    assert [BlockOrder(5, seed=2)[i] for i in range(5)] != passes[0]


def mean_nll(model: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """Per token over all rows, each by itself."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logprobs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        for t in range(1, len(row)):
            total = total - logprobs[t - 1, row[t]]
    return total / sum(len(row) - 1 for row in rows)


def ppo_objective(model: torch.nn.Module, e: Experience) -> torch.Tensor:
    """The mean over answer tokens of -advantage * ratio; on the first step nothing is clipped."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(e)):
        ids = e.sequences[row][e.attention_mask[row]]
        length = int(e.answer_mask[row].sum())
        if not e.real[row]:
            continue
        logprobs = model(ids[None]).logits[0].log_softmax(-1)
        for t in range(length):
            at = len(ids) - length + t
            ratio = torch.exp(logprobs[at - 1, ids[at]] - e.logprobs[row, t].double())
            total = total - e.advantages[row, t].double() * ratio
        count += length
    return total / count


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 1), (1, 4)])
def test_the_gradient_is_that_of_ppo_plus_that_of_the_text(
    rollout, folders, distributed, stage, micro_batch, accumulation
):
    """Against float64, one text at a time."""
    e = Experience(**torch.load(rollout))
    setting = Setting(zero_stage=stage, micro_batch=micro_batch, accumulation=accumulation)
    found = train(setting, e, folders["llama"], distributed)["gradients"][0]
    model = AutoModelForCausalLM.from_pretrained(folders["llama"].actor, dtype=torch.float64).eval()
    config = ppo_trainer(None, setting).config
    numbers = np.random.default_rng([SEED, 0]).permutation(BLOCKS)[:4]
    text = [blocks().blocks["input_ids"][int(n)] for n in numbers]
    (learned,) = whitened(with_advantages([e], config, config.kl_coef), identity)
    loss = ppo_objective(model, learned) + COEFFICIENT * mean_nll(model, text)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name].double(),
            gradient,
            atol=2 * NEAR_ONE,
            rtol=GRADIENTS,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.fixture(scope="module")
def on_two_ranks(rollout, folders: dict[str, Folders], tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("ranks")
    args = [str(rollout), str(folders["llama"].actor.parent), str(out / "results.pt")]
    run_ranks(Path(__file__).with_name("ptx_worker.py"), 2, args, log_dir=out)
    return torch.load(out / "results.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_two_ranks_agree_with_one(on_two_ranks, rollout, folders, distributed, name):
    """One process takes all rows of a step at once, without ZeRO."""
    e = Experience(**torch.load(rollout))
    plain = Setting(micro_batch=4, lora=CELLS[name].lora)
    expected = train(plain, e, folders["llama"], distributed)
    actual = on_two_ranks[name]
    assert actual["position"] == expected["position"] == 2 * 4  # epochs, rows: more than BLOCKS
    assert actual["figures"]["ptx_loss"] == pytest.approx(
        expected["figures"]["ptx_loss"], abs=LOGITS
    )
    assert_trained_alike(actual["actor"], expected["actor"], plain, steps=2)


def test_the_figure_is_the_loss_of_the_blocks_used(load_roles, distributed):
    """Without PPO steps in between: nats per token of a model in evaluation."""
    setting = Setting(lora=LORA)
    roles = load_roles(setting)
    ptx = mix_in(distributed)
    ptx.backward(roles.actor, [2, 1])
    numbers = np.random.default_rng([SEED, 0]).permutation(BLOCKS)[:3]
    rows = [blocks().blocks["input_ids"][int(n)] for n in numbers]
    with torch.no_grad():
        expected = mean_nll(roles.actor.module.double(), rows).item()
    assert ptx.statistics()["ptx_loss"] == pytest.approx(expected, abs=LOGITS)
    assert ptx.statistics() == {}  # none since the last call


def test_it_goes_on_where_it_stood():
    one, other = (PTX(blocks(), 1.0, seed=SEED, rank=0, world_size=1) for _ in range(2))
    one.position = 9
    other.load_state_dict(one.state_dict())
    assert other.position == 9 and other.length == LENGTH


def test_without_text_nothing_is_mixed_in(rollout, folders, distributed):
    e = Experience(**torch.load(rollout))
    setting = Setting(micro_batch=4)
    with_text = train(setting, e, folders["llama"], distributed)
    without = train(setting, e, folders["llama"], distributed, mixed=False)
    assert "ptx_loss" in with_text["figures"] and "ptx_loss" not in without["figures"]
    name = "model.layers.0.mlp.up_proj.weight"
    gap = with_text["gradients"][0][name] - without["gradients"][0][name]
    assert gap.abs().max() > DIFFERENT
