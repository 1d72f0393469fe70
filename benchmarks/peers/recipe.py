"""The recipe of a step as it is run, in turns: of this commit, or of the one on PYTHONPATH.

Its `main.py` runs in this process, and the engine's `step` tells of the optimizer steps. It knows
flags alone that every commit since 1ef78d1 has.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.peers.task import ANSWER, ANSWERS, KL, RANK, RATE, Task, Turns, tokenizer

RECIPES = dict.fromkeys(("grpo", "rloo", "ppo"), "step3_rlhf_finetuning")
RECIPES |= {"reward": "step2_reward_model_finetuning", "dpo": "step2_dpo_finetuning"}


def write(folder: Path, task: Task) -> dict[str, Any]:
    """Write model, reward model and prompts; the flags that name them."""
    models: dict[str, PreTrainedModel] = {"actor": task.language_model()}
    if task.kind == "ppo":
        models["critic"] = task.classifier()
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer(task.vocabulary).save_pretrained(folder / name)
    count = task.all_steps * task.batch // (1 if task.kind == "ppo" else ANSWERS)
    for name, rows in (("train", count), ("test", 2)):
        lines = [{"prompt": text, "chosen": " w5"} for text in task.prompts(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {f"{name}_model_name_or_path": folder / name for name in models}
    return flags | {"data_path": folder, "data_output_path": folder / "rows"}


def flags(task: Task, written: dict[str, Any]) -> dict[str, Any]:
    """Flags of the recipe: by default one optimizer step an iteration, answers of one length."""
    of_kind: dict[str, Any] = {
        "advantage_estimator": task.kind,
        "answers_per_prompt": ANSWERS,
        "per_device_generation_batch_size": task.batch // ANSWERS,
        "reward_function": "benchmarks.peers.task:variety",
        "prompt_format": "raw",
    }
    if task.kind == "ppo":
        of_kind = {
            "per_device_generation_batch_size": task.batch,
            "critic_lora_dim": RANK,
            "critic_learning_rate": RATE,
            "reward_scaling": "none",
            "prompt_format": "dschat",
        }
    return {
        **written,
        **of_kind,
        "data_split": "0,0,1",
        "max_prompt_seq_len": task.length,
        "max_answer_seq_len": ANSWER,
        "min_answer_seq_len": ANSWER,
        "per_device_training_batch_size": task.batch // task.updates,
        "max_steps": task.all_steps,
        "actor_lora_dim": RANK,
        "actor_learning_rate": RATE,
        "actor_weight_decay": 0.0,
        "kl_coef": KL,
        "lr_scheduler_type": "constant",
        "num_warmup_steps": 0,
        "eval_interval": 0,
        "log_every": 1,
        "dtype": "fp32",
    }


def of_pairs(task: Task) -> dict[str, Any]:
    """Flags of the recipe of a reward model or of DPO, besides those that the task holds."""
    return {
        "model_name_or_path": task.model,
        "max_seq_len": task.length,
        "per_device_train_batch_size": task.batch // 2,
        "max_steps": task.all_steps,
        "lora_dim": RANK,
        "lr_scheduler_type": task.schedule,
        "num_warmup_steps": task.warm_up,
        "lora_save": "merged",
        "log_every": 1,
        "dtype": "fp32",
        "output_dir": task.output,
        **task.flags,
    }


def train(task: Task) -> None:
    """Run the recipe, and wait between turns."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    step, turns, made = DeepSpeedEngine.step, Turns(task.steps), 0
    calls = task.updates * (1 + (task.kind == "ppo"))  # a batch's, of all engines

    def told(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> None:
        nonlocal made
        step(self, *args, **kwargs)
        made += 1
        if made % calls == 0:
            turns.step_made()

    DeepSpeedEngine.step = told
    found = importlib.util.find_spec("dschat")
    assert found is not None and found.origin is not None
    program = Path(found.origin).parents[1] / "training" / RECIPES[task.kind] / "main.py"
    with tempfile.TemporaryDirectory() as folder:
        if task.output:
            given = of_pairs(task)
        else:
            given = flags(task, write(Path(folder), task)) | {"output_dir": Path(folder, "out")}
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        sys.argv = [str(program), *words]
        runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Task.given())
