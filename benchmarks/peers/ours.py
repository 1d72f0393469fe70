"""This project's training of a task: the loop of its recipes, on given batches."""

from __future__ import annotations

import torch

from benchmarks.peers.task import PAD, RANK, RATE, Clock, Task, serve
from dschat.data.collators import PairCollator, SFTCollator
from dschat.functional.losses import mean_scale, pairwise_loss
from dschat.models.reward_model import RewardModel
from dschat.train.engine import backward, build_engine
from dschat.train.evaluation import answer_loss, pair_scores
from dschat.train.model_config import ModelConfig
from dschat.train.progress import finite_loss
from dschat.utils.distributed import init_distributed
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import schedule_factory


def trained(row: dict) -> dict:
    """Row of SFT whose answer trains."""
    length = len(row["input_ids"])
    return {"input_ids": row["input_ids"], "length": length, "trained": [row["start"], length]}


def train(task: Task, clock: Clock) -> None:
    """Build the engine, and make the steps."""
    is_sft = task.kind == "sft"
    module = task.language_model()
    if not is_sft:
        module = RewardModel(module.model)
        with torch.no_grad():
            module.v_head.weight.copy_(task.head())
    config = EngineConfig(zero_stage=0, dtype="fp32", micro_batch_size=task.batch)
    model = ModelConfig(
        optimizer=OptimizerConfig(learning_rate=RATE), lora=LoraConfig(lora_dim=RANK)
    )
    schedule = schedule_factory("constant", 0, task.steps + 1)
    engine = build_engine(module, config, model, schedule, 1, task.kind)
    given = task.answers() if is_sft else task.pairs()
    size = task.batch if is_sft else task.batch // 2
    for number in range(task.steps + 1):
        rows = given[number * size : (number + 1) * size]
        if is_sft:
            batch = SFTCollator(PAD)([trained(row) for row in rows])
            count, loss = float(batch.loss_mask.sum()), answer_loss(engine, batch)
        else:
            batch = PairCollator(PAD)([row | {"prompt_len": 1} for row in rows])
            count, loss = float(size), pairwise_loss(*pair_scores(engine, batch), batch.real)
        backward(engine, loss * mean_scale(count, 1), last=True)
        total = finite_loss(number + 1, [loss.detach()], count, engine.gradients)
        engine.step()
        clock.first_loss = clock.first_loss or total / count
        clock.step_made()
    engine.destroy()


if __name__ == "__main__":
    init_distributed()
    task = Task.given()
    serve(task.steps, lambda clock: train(task, clock))
