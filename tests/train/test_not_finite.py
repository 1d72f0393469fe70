"""A run whose loss, gradients or weights are not finite stops, and saves nothing of it."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dschat.errors import UserError
from dschat.train.checkpoint_config import CheckpointConfig
from dschat.train.checkpoint_source import Position
from dschat.train.checkpointer import Checkpointer, check_weights
from dschat.train.finite import GradientWatch
from dschat.train.metrics import LogConfig, MetricLogger
from dschat.train.model_config import ModelConfig
from dschat.train.progress import TrainingLog, finite_loss
from dschat.utils import zero
from dschat.utils.distributed import Distributed
from dschat.utils.ds_utils import ZERO_STAGES
from dschat.utils.optim import build_optimizer, get_optimizer_grouped_parameters
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.perf import Gpus
from tests.helpers.launch import run_ranks
from tests.helpers.steps import REWARD, SFT, run_worker, write_inputs
from tests.helpers.tiny import tiny_llama

WORKER = Path(__file__).with_name("gradients_worker.py")
REMEDY = "the run stops and its weights are not saved; give a lower learning rate, or look for"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_its_step(loss: float):
    assert finite_loss(3, [torch.tensor(5.0), torch.tensor(3.0)], targets=4.0) == 8.0
    with pytest.raises(UserError) as error:
        finite_loss(3, [torch.tensor(loss)], targets=4.0)
    assert str(error.value).startswith(f"loss of optimizer step 3 is {loss} on rank 0: {REMEDY}")


def test_a_gradient_that_is_not_finite_names_its_tensor():
    """The root's slope at 0 is infinite; the loss itself is 0."""
    module = nn.Linear(2, 1)
    module.unused = nn.Parameter(torch.ones(1), requires_grad=False)
    watch = GradientWatch(module)
    (module(torch.ones(1, 2)).sum() * 0.0 + module.weight.sum()).backward()
    assert finite_loss(1, [torch.tensor(1.0)], 1.0, watch) == 1.0
    with torch.no_grad():
        module.bias.zero_()
    loss = (module.bias.abs().sqrt() + module.weight.sum() * 0.0).sum()
    loss.backward()
    with pytest.raises(UserError) as error:
        finite_loss(3, [loss.detach()], 1.0, watch)
    found = "loss of optimizer step 3 is 0.0, and the gradient of bias on rank 0 is not finite"
    assert str(error.value).startswith(f"{found}: {REMEDY}")
    assert finite_loss(4, [torch.tensor(1.0)], 1.0, watch) == 1.0  # nothing is left of it


@pytest.mark.slow
def test_a_gradient_of_one_rank_ends_all_before_weights_change(tmp_path: Path):
    """At every ZeRO stage; the gradient of the second rank's middle layer is nan."""
    for printed in run_ranks(WORKER, 2, [], tmp_path):
        found = [line.split(" | ") for line in printed.splitlines() if line.startswith("FOUND")]
        assert [stage for stage, *_ in found] == [f"FOUND ZeRO {stage}" for stage in ZERO_STAGES]
        for _, first, second, same in found:
            assert (first, same) == ("nothing", "True")
            layer = r"layers\.0\.self_attn\.v_proj\.lora_[AB]"
            assert re.fullmatch(rf"the gradient of .*{layer} on rank 1 is not finite", second)


@pytest.fixture
def log() -> TrainingLog:
    """A log of 10 steps over an engine whose last step had a gradient norm of nan."""
    module, rates = tiny_llama(), OptimizerConfig(1e-3)
    engine = SimpleNamespace(
        module=module,
        optimizer=build_optimizer(get_optimizer_grouped_parameters(module, rates), rates),
        get_global_grad_norm=lambda: math.nan,
        was_step_applied=lambda: True,
        fp16_enabled=lambda: False,
    )
    metrics = MetricLogger(LogConfig(), None, rank=1)
    return TrainingLog(metrics, engine, ModelConfig(), Gpus(1, torch.float32, None), 10)


def test_gradients_that_are_not_finite(log: TrainingLog):
    with pytest.raises(UserError, match="gradient norm of optimizer step 1 is nan: the run stops"):
        log.step(1, 2.0, [1.0, 1.0, 1.0])
    log.engine.was_step_applied = lambda: False  # DeepSpeed skips it also in fp32, and says nothing
    with pytest.raises(UserError, match="gradient norm of optimizer step 1 is nan: the run stops"):
        log.step(1, 2.0, [1.0, 1.0, 1.0])
    log.engine.fp16_enabled = lambda: True
    log.engine.skipped_steps = 1
    log.step(1, 2.0, [1.0, 1.0, 1.0])


def test_an_evaluation_that_is_not_finite(log: TrainingLog):
    log.evaluation(0, {"loss": 2.0}, 1.0)
    with pytest.raises(UserError, match="evaluation loss after 0 optimizer steps is nan"):
        log.evaluation(0, {"loss": math.nan}, 1.0)


def test_what_fills_up_a_shard_is_no_weight(monkeypatch):
    """Two ranks share 3 elements in shards of 2; the fourth is what was in memory."""
    module, parameter = nn.Module(), nn.Parameter(torch.empty(0))
    vars(parameter).update(ds_id=0, ds_shape=(3,), ds_process_group=None)
    parameter.ds_tensor = torch.tensor([5.0, torch.nan])
    module.weight = parameter
    monkeypatch.setattr(zero.dist, "get_rank", lambda group: 1)
    check_weights("actor", module, 3)
    monkeypatch.setattr(zero.dist, "get_rank", lambda group: 0)
    with pytest.raises(UserError, match="step 3: weights of the actor are not finite"):
        check_weights("actor", module, 3)


def test_no_checkpoint_of_weights_that_are_not_finite(tmp_path: Path):
    alone, module = Distributed(0, 1, 0, torch.device("cpu")), nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    checkpointer = Checkpointer(CheckpointConfig(), str(tmp_path), SimpleNamespace(), alone)
    checkpointer.engines = {"actor": SimpleNamespace(module=module)}
    with torch.no_grad():
        module.weight[1, 0] = math.inf
    with pytest.raises(UserError, match="step 7: weights of the actor are not finite"):
        checkpointer.save(Position(7))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_each_step_stops_and_saves_nothing(tmp_path: Path):
    """A step at the largest rate there is takes the model out of fp32."""
    write_inputs(tmp_path)
    common = ["--data_path", "data", "--data_output_path", "cache", "--dtype", "fp32"]
    rate = ["--max_seq_len", "64", "--learning_rate", "1e9"]
    plan = [
        [SFT, "--model_name_or_path", "model", *common, *rate, "--output_dir", "sft"],
        [REWARD, "--model_name_or_path", "model", *common, *rate, "--output_dir", "reward"],
    ]
    plan[1] += ["--save_steps", "1"]
    results, _ = run_worker(plan, tmp_path, ranks=1)
    for result, folder in zip(results, ("sft", "reward"), strict=True):
        assert result.code == 2, result.stderr[-3000:]
        (line,) = (x for x in result.stderr.splitlines() if x.startswith("error: "))
        assert "step" in line and "not saved" in line
        assert not (tmp_path / folder / "config.json").exists()
