"""PPO on two ranks, at every kind of sharding, against one process that sees all rows."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dschat.rlhf.experience import Experience
from dschat.rlhf.part_config import EMAConfig
from tests.helpers.launch import run_ranks
from tests.helpers.rounding import DIFFERENT, LOGITS, ROUNDING
from tests.helpers.tiers import by_tier, tiers
from tests.rlhf.ppo_worker import CELLS, CHANGES, EPOCHS, train
from tests.rlhf.tiny_roles import Setting, assert_trained_alike, end_after, ppo_trainer, prompts

PAIRS = [name for name, changes in CHANGES.items() if "answers_per_prompt" in changes]
NO_PAIRS = [name for name in CELLS if name not in PAIRS]
CORE = {"zero 2, lora", "zero 3, lora", "zero 2, knobs"}


@pytest.fixture(scope="module")
def rollout(folders, distributed, tmp_path_factory) -> Path:
    """Eight rows sampled by one process: answers of several lengths, one row of filler."""
    setting = Setting()
    roles = setting.load(folders["llama"], distributed)
    trainer = ppo_trainer(roles, setting, per_device_generation_batch_size=8)
    torch.manual_seed(0)
    hook = end_after(roles.actor.module, [2, 6, 1, None, 3, 4, None, 2])
    (e,) = trainer.rollout([prompts(7)])
    hook.remove()
    assert e.real.tolist() == [True] * 7 + [False]
    path = tmp_path_factory.mktemp("rollout") / "rollout.pt"
    torch.save(e.__getstate__(), path)
    return path


@pytest.fixture(scope="module")
def on_two_ranks(rollout, folders, tmp_path_factory) -> Callable[[str], dict]:
    """A cell by its name."""
    folder = folders["llama"].actor.parent

    def run(names: list[str]) -> dict[str, dict]:
        out = tmp_path_factory.mktemp("ranks")
        args = [";".join(names), str(rollout), str(folder), str(out / "results.pt")]
        run_ranks(Path(__file__).with_name("ppo_worker.py"), 2, args, log_dir=out)
        return torch.load(out / "results.pt")

    return by_tier(CELLS, CORE, run)


@pytest.fixture(scope="module")
def on_one(rollout, folders, distributed) -> Callable[[str], dict]:
    """The same with all rows in one micro-batch and no sharding, with and without adapters."""
    e = Experience(**torch.load(rollout))
    plain = Setting(micro_batch=8, ema=EMAConfig(True, 0.5))
    results: dict[tuple, dict] = {}

    def result(name: str) -> dict:
        lora, changes = CELLS[name].lora, CHANGES.get(name, {})
        key = lora, *sorted(changes.items())
        if key not in results:
            setting = dataclasses.replace(plain, lora=lora)
            results[key] = train(setting, e, folders["llama"], distributed, **changes)
        return results[key]

    return result


@pytest.mark.parametrize("name", tiers(CELLS, CORE))
@pytest.mark.parametrize("what", ["actor", "critic", "average"])
def test_weights_agree(on_two_ranks, on_one, name, what):
    if what == "critic" and name in PAIRS:
        assert what not in on_two_ranks(name)
        return
    steps = CHANGES.get(name, {}).get("ppo_epochs", EPOCHS)
    assert_trained_alike(on_two_ranks(name)[what], on_one(name)[what], CELLS[name], steps)


@pytest.mark.parametrize("name", tiers(CELLS, CORE))
def test_the_average_is_not_the_actor(on_two_ranks, name):
    result = on_two_ranks(name)
    gaps = [(result["average"][k] - v).abs().max() for k, v in result["actor"].items()]
    assert max(gaps) > DIFFERENT


@pytest.mark.parametrize("name", tiers(CELLS, CORE))
def test_figures_agree(on_two_ranks, on_one, name):
    figures = dict(on_two_ranks(name)["figures"])
    # DeepSpeed measures no norm without ZeRO in fp32.
    norms = {n: figures.pop(n) for n in sorted(figures) if n.endswith("grad_norm")}
    assert len(norms) == (0 if "zero 0" in name else 1 if name in PAIRS else 2)
    assert all(norm > 0 for norm in norms.values())
    expected = {n: x for n, x in on_one(name)["figures"].items() if not n.endswith("grad_norm")}
    assert figures == pytest.approx(expected, abs=LOGITS)
    assert on_two_ranks(name)["kl_coefficient"] == pytest.approx(on_one(name)["kl_coefficient"])


def test_gradient_norms_do_not_depend_on_the_stage(on_two_ranks):
    two, three = (on_two_ranks(f"zero {stage}, lora")["figures"] for stage in (2, 3))
    for name in ("actor_grad_norm", "critic_grad_norm"):
        # A root of a sum of at most 4,000 squares, each off by about 64 ** 0.5 roundings.
        assert two[name] == pytest.approx(three[name], rel=4000**0.5 * 8 * ROUNDING)


@pytest.mark.slow
def test_ranks_end_an_update_together(on_two_ranks):
    """By its own rows rank 1 would go on, and the collectives of the two no longer match."""
    name = "zero 3, held"
    figures = on_two_ranks(name)["figures"]
    assert figures["actor_updates"] == 0.5 and figures["update_kl"] > 1.45
    assert on_two_ranks(name)["kl_coefficient"] < 0.1  # by all answers


@pytest.mark.parametrize("name", tiers(NO_PAIRS, CORE & {*NO_PAIRS}))
def test_ranks_may_generate_unequally_long(on_two_ranks, name):
    """Answers of 1 and 2 tokens here, 6 there, one row of filler."""
    figures = on_two_ranks(name)["own"]
    assert figures["answer_length"] == pytest.approx((1 + 2 + 6) / 3)
    assert figures["ended"] == pytest.approx(2 / 3)
    assert figures["kl_k3"] > 0
    assert figures["ratio"] == pytest.approx(1.0, abs=LOGITS)
    assert figures["clip_fraction"] == 0.0
