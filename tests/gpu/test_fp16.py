"""fp16: a step whose gradients overflow is skipped, and the loss scale falls."""

import math

import torch

from dschat.train.engine import Engine, backward, build_engine
from dschat.train.model_config import ModelConfig
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim import check_rates, group_rates
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import schedule_factory
from tests.helpers.tiny import padded, tiny_llama, token_rows

RATES = OptimizerConfig(learning_rate=1e-3, loraplus_lr_ratio=16.0)


def train_step(engine: Engine, device: torch.device, factor: float) -> bool:
    """Take one step on a loss times `factor`; tell whether it was applied."""
    ids, mask = (tensor.to(device) for tensor in padded(token_rows(2, seed=1)))
    logits = engine(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits.float()
    loss = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    backward(engine, loss * factor, last=True)
    engine.step()
    return engine.was_step_applied()


def test_an_overflow_skips_the_step_and_halves_the_scale(device, distributed):
    config = EngineConfig(zero_stage=0, dtype="fp16", micro_batch_size=2)
    model = ModelConfig(optimizer=RATES, lora=LoraConfig(lora_dim=4))
    schedule = schedule_factory("constant", 0, 10)
    module = tiny_llama().half()
    engine = build_engine(module, config, model, schedule, distributed.world_size, "fp16")
    adapters = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    rates = group_rates(engine.optimizer)
    assert rates == {"lora_A": 1e-3, "lora_B": 16e-3}

    before = {name: p.detach().clone() for name, p in adapters.items()}
    scale = engine.optimizer.loss_scale
    # DeepSpeed's hysteresis lets the first overflow pass and halves the scale at the second.
    assert [train_step(engine, device, math.inf) for _ in range(2)] == [False, False]
    assert engine.optimizer.loss_scale == scale / 2
    assert all(torch.equal(p, before[name]) for name, p in adapters.items())

    while not train_step(engine, device, 1.0):  # until the scale fits real gradients
        assert engine.optimizer.loss_scale >= 1.0
    assert any(not torch.equal(p, before[name]) for name, p in adapters.items())
    assert all(p.isfinite().all() for p in adapters.values())
    assert group_rates(engine.optimizer) == rates
    check_rates(engine.optimizer, RATES)
