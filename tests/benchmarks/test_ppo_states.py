"""The table of model states against parameters counted by hand and bytes that engines allocate."""

import pytest

from benchmarks.ppo_states import LLAMA_3, PAIRS, Options, states, table
from dschat.plan.states import BYTES
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.utils.distributed import init_distributed
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers.tiny import tiny_llama, tiny_opt
from tests.rlhf.one_base import save_one_base
from tests.rlhf.tiny_roles import Setting, ppo_trainer, rollout

LORA = LoraConfig(lora_dim=4)
SHARE = {"full": "auto", "none": "none", "auto": "auto", "all": "all"}


@pytest.fixture(scope="module")
def one_base(tmp_path_factory):
    return save_one_base(tmp_path_factory.mktemp("base")), init_distributed()


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def allocated(roles: DeepSpeedRLHFEngine) -> dict[str, float]:
    """Bytes of weights, all of them, and of the optimizers with their fp32 masters."""
    modules = [*(e.module for e in roles.trained.values()), roles.reference, roles.reward]
    named = [item for m in modules if m is not None for item in m.named_parameters()]
    # What the folders' own adapters bring is in no table: kept apart by one trunk, else merged.
    weights = [p for name, p in named if ".fixed_update." not in name]
    optimizer = []
    for engine in roles.trained.values():
        wrapped = getattr(engine.optimizer, "optimizer", engine.optimizer)
        of_weights = {id(p) for p in engine.module.parameters()}
        for group in wrapped.param_groups:
            optimizer += [p for p in group["params"] if id(p) not in of_weights]
        for state in wrapped.state.values():
            optimizer += [t for k, t in state.items() if k in ("exp_avg", "exp_avg_sq")]
    return {"weights": size(weights), "optimizer": size(optimizer)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", SHARE)
def test_states_are_what_engines_allocate(one_base, layout, dtype):
    folders, distributed = one_base
    lora = LoraConfig() if layout == "full" else LORA
    setting = Setting(lora=lora, dtype=dtype, share_trunk=SHARE[layout])
    roles = setting.load(folders, distributed)
    ppo_trainer(roles, setting).train_rlhf([rollout(ppo_trainer(roles, setting))])
    config = tiny_llama().config
    expected = states(config, config, layout, Options(dtype=dtype, lora=LORA))
    found = allocated(roles)
    # Beside its trunk a critic that the reward model is keeps a second head.
    head = 0 if layout in ("full", "none") else config.hidden_size * BYTES[dtype]
    assert found["weights"] == sum(s.weights for s in expected.values()) + head
    # DeepSpeed fills its flat groups up, by less than 64 bytes each.
    surplus = found["optimizer"] - sum(s.optimizer for s in expected.values())
    assert 0 <= surplus < 1000


def test_gradients_are_those_of_what_trains(one_base):
    folders, distributed = one_base
    roles = Setting(lora=LORA, share_trunk="all").load(folders, distributed)
    trainer = ppo_trainer(roles, Setting(lora=LORA))
    gradients = []
    for engine in roles.trained.values():
        step = engine.step
        engine.step = lambda step=step, engine=engine: (
            gradients.extend(p.grad for p in engine.module.parameters() if p.grad is not None),
            step(),
        )
    trainer.train_rlhf([rollout(trainer)])
    config = tiny_llama().config
    expected = states(config, config, "all", Options("fp32", lora=LORA))
    assert size(gradients) == sum(s.gradients for s in expected.values()) > 0


def test_parameters_by_hand():
    """Llama 3: its published 8.03 billion; r = 16 on the seven layers of 32 blocks."""
    whole = states(LLAMA_3, LLAMA_3, "full", Options())
    assert whole["actor"].weights == whole["actor"].trained == 2 * 8_030_261_248
    h, ffn, kv = 4096, 14336, 1024
    per_block = 16 * (2 * (h + h) + 2 * (h + kv) + 3 * (h + ffn))
    adapted = states(LLAMA_3, LLAMA_3, "auto", Options())["actor"]
    assert adapted.trained == 2 * 32 * per_block
    assert adapted.weights == 2 * (32 * per_block + 8_030_261_248)
    # no output head, a value head
    assert whole["critic"].trained == 2 * (8_030_261_248 - 128256 * h + h)


def test_sharding_divides_what_it_shards():
    config, critic = tiny_opt().config, tiny_llama().config
    one = states(config, critic, "full", Options())
    for stage, shares in enumerate([(1, 1, 4), (1, 1, 4), (1, 4, 4), (4, 4, 4)]):
        four = states(config, critic, "full", Options(zero_stage=stage, ranks=4))
        for name, whole in one.items():
            assert four[name].weights * shares[0] == whole.weights
            assert four[name].gradients * shares[1] == whole.gradients
            assert four[name].optimizer * shares[2] == whole.optimizer
    unsharded = states(config, critic, "full", Options("fp32", zero_stage=0, ranks=4))
    assert unsharded["actor"].optimizer == 8 / 12 * one["actor"].optimizer


@pytest.mark.slow
def test_the_table_has_a_line_for_each_layout_that_exists():
    lines = table(Options(), 48.0)
    rows = [line for line in lines if line.startswith(("| OPT", "| Llama"))]
    assert len(rows) == 2 * 3 + 2 * 4
    assert all(name in "".join(rows) for name in PAIRS)
    sharded = "".join(table(Options(zero_stage=3, ranks=8), 48.0))
    assert "two trunks" in sharded and "one trunk" not in sharded
    fits = {tuple(row.split(" | ")[:2]): row.endswith("yes |") for row in rows}
    assert fits["| Llama-2-7B, critic 7B", "LoRA, two trunks"]
    assert not fits["| Llama-2-7B, critic 7B", "LoRA, four copies"]
