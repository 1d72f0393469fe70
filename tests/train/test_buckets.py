"""DeepSpeed's buffers of gradients are as large as what trains."""

import json
from pathlib import Path

import pytest
import torch

from dschat.train.engine import Engine, backward, build_engine
from dschat.train.model_config import ModelConfig
from dschat.utils.distributed import init_distributed
from dschat.utils.ds_utils import BUCKET, EngineConfig, get_train_ds_config
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import schedule_factory
from tests.helpers.recorder import Recorder
from tests.helpers.tiny import tiny_llama

LARGE = 2**20  # bytes; the model and all that it computes here are smaller


def engine_of(stage: int, dtype: str, user: str | None) -> Engine:
    config = EngineConfig(zero_stage=stage, dtype=dtype, micro_batch_size=1, deepspeed_config=user)
    model = ModelConfig(optimizer=OptimizerConfig(learning_rate=1e-4), lora=LoraConfig(lora_dim=4))
    module = tiny_llama().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    return build_engine(module, config, model, schedule_factory("constant", 0, 10), 1, "buckets")


def one_step(stage: int, dtype: str, user: str | None = None) -> Recorder:
    init_distributed()
    with Recorder(LARGE) as recorder:
        engine = engine_of(stage, dtype, user)
        loss = engine(input_ids=torch.arange(3, 35)[None], use_cache=False).logits.float().sum()
        backward(engine, loss, last=True)
        engine.step()
    engine.destroy()
    return recorder


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")]
)
def test_adapters_bring_no_large_buffer(stage, dtype):
    assert not one_step(stage, dtype).allocations


def test_a_users_bucket_wins(tmp_path: Path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": LARGE}}))
    found = one_step(2, "fp32", str(file)).allocations
    assert found == {("float32", (LARGE,)): 2}  # two, of which one fills while one is sent


def test_a_bucket_is_never_larger_than_deepspeeds_own():
    config = EngineConfig(zero_stage=2, dtype="bf16", micro_batch_size=1)
    for trained, size in ((7, 7), (BUCKET + 1, BUCKET)):
        assert (
            get_train_ds_config(config, 1, trained)["zero_optimization"]["reduce_bucket_size"]
            == size
        )
    assert "reduce_bucket_size" not in get_train_ds_config(config, 1)["zero_optimization"]
