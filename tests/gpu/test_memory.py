"""Memory that a step of training allocates: adapters against all weights."""

import gc

import torch

from dschat.train.engine import backward, build_engine
from dschat.train.model_config import ModelConfig
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import schedule_factory
from tests.helpers.tiny import tiny_llama

SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
STATE_BYTES = 2 * 4  # of Adam's two fp32 moments


def peak_of_two_steps(device: torch.device, lora: LoraConfig) -> tuple[int, int]:
    """Bytes at the peak, and numbers trained; the second step holds the optimizer's states."""
    gc.collect()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    config = EngineConfig(zero_stage=0, dtype="fp32", micro_batch_size=1)
    model = ModelConfig(optimizer=OptimizerConfig(learning_rate=1e-4), lora=lora)
    schedule = schedule_factory("constant", 0, 10)
    engine = build_engine(tiny_llama(**SHAPE), config, model, schedule, 1, "memory")
    ids = torch.arange(3, 35, device=device)[None]
    for _ in range(2):
        loss = engine(input_ids=ids, use_cache=False).logits.float().square().mean()
        backward(engine, loss, last=True)
        engine.step()
    trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    peak = torch.cuda.max_memory_allocated(device) - start
    engine.destroy()
    return peak, trained


def test_adapters_save_at_least_the_optimizer_states(device, distributed):
    full, all_weights = peak_of_two_steps(device, LoraConfig())
    adapters, trained = peak_of_two_steps(device, LoraConfig(lora_dim=4))
    assert trained < 0.05 * all_weights
    assert full - adapters >= STATE_BYTES * (all_weights - trained)
