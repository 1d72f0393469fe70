"""This project's training of a task: the loop of its recipes, on given batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.peers.task import PAD, RANK, RATE, Task, Turns
from dschat.data.collators import PairCollator, PreferenceCollator, SFTCollator
from dschat.functional.losses import mean_scale, pairwise_loss
from dschat.models.reward_model import RewardModel
from dschat.train.engine import Engine, backward, build_engine
from dschat.train.evaluation import answer_loss, pair_scores
from dschat.train.model_config import ModelConfig
from dschat.train.preference_config import PreferenceConfig
from dschat.train.preferences import Objective
from dschat.train.progress import finite_loss
from dschat.train.reference import AdaptersOff
from dschat.utils.distributed import init_distributed
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import schedule_factory


def trained(row: dict) -> dict:
    """Row of SFT whose answer trains."""
    length = len(row["input_ids"])
    return {"input_ids": row["input_ids"], "length": length, "trained": [row["start"], length]}


def preferred(row: dict) -> dict:
    """Row of DPO, numbered as no set numbers it."""
    prompt = row["prompt_ids"]
    sides = {side: prompt + row[side] for side in ("chosen_ids", "rejected_ids")}
    return sides | {"prompt_len": len(prompt), "number": -1}


def engine_of(task: Task) -> Engine:
    """Build the engine around the task's model."""
    module = task.language_model()
    if task.kind == "reward":
        module = RewardModel(module.model)
        with torch.no_grad():
            module.v_head.weight.copy_(task.head())
    config = EngineConfig(zero_stage=0, dtype="fp32", micro_batch_size=task.batch)
    model = ModelConfig(
        optimizer=OptimizerConfig(learning_rate=RATE), lora=LoraConfig(lora_dim=RANK)
    )
    schedule = schedule_factory("constant", 0, task.all_steps)
    return build_engine(module, config, model, schedule, 1, task.kind)


def losses(task: Task, engine: Engine) -> Iterator[tuple[torch.Tensor, float]]:
    """Sum of the loss over each batch, and what it is a mean over."""
    rows = {"sft": task.answers, "reward": task.pairs, "dpo": task.preferences}[task.kind]()
    size = task.batch if task.kind == "sft" else task.batch // 2
    settings = PreferenceConfig()
    objective = Objective(settings.loss, settings.coefficients, AdaptersOff())
    for start in range(0, len(rows), size):
        given = rows[start : start + size]
        if task.kind == "sft":
            answers = SFTCollator(PAD)([trained(row) for row in given])
            yield answer_loss(engine, answers), float(answers.loss_mask.sum())
        elif task.kind == "reward":
            pairs = PairCollator(PAD)([row | {"prompt_len": 1} for row in given])
            yield pairwise_loss(*pair_scores(engine, pairs), pairs.real), float(size)
        else:
            preferences = PreferenceCollator(PAD)([preferred(row) for row in given])
            yield objective(engine, preferences)[0], float(size)


def train(task: Task) -> None:
    """Build the engine, and make the steps."""
    engine, turns = engine_of(task), Turns(task.steps)
    for number, (loss, count) in enumerate(losses(task, engine), 1):
        backward(engine, loss * mean_scale(count, 1), last=True)
        total = finite_loss(number, [loss.detach()], count, engine.gradients)
        engine.step()
        turns.first_loss = turns.first_loss or total / count
        turns.step_made()


if __name__ == "__main__":
    torch.set_num_threads(1)
    init_distributed()
    train(Task.given())
