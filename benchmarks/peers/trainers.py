"""A task by transformers' Trainer with PEFT, or by TRL's trainers; runs in their environments."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import SequentialSampler

from benchmarks.peers.task import PAD, RANK, RATE, Clock, Task, serve, tokenizer


class Ticks(transformers.TrainerCallback):
    """Tells the clock of each optimizer step."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """See Trainer."""
        self.clock.step_made()


class InOrder:
    """Mixin: rows come in the order that all peers have."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class PairTrainer(InOrder, transformers.Trainer):
    """Trainer with the pairwise loss; batches hold chosen rows over rejected ones."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """See Trainer."""
        chosen, rejected = model(**inputs).logits.squeeze(-1).chunk(2)
        return -functional.logsigmoid(chosen - rejected).mean()


class PlainTrainer(InOrder, transformers.Trainer):
    """Trainer with the model's own loss."""


def answers_collated(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad ids, mask and labels on the right."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [
        torch.where(torch.arange(len(i)) < row["start"], -100, i)
        for i, row in zip(ids, rows, strict=True)
    ]
    return {
        "input_ids": pad_sequence(ids, True, PAD),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], True, 0),
        "labels": pad_sequence(labels, True, -100),
    }


def pairs_collated(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad the chosen over the rejected."""
    ids = [torch.tensor(row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    mask = [torch.ones_like(i) for i in ids]
    return {"input_ids": pad_sequence(ids, True, PAD), "attention_mask": pad_sequence(mask, True)}


def lora(task: Task) -> LoraConfig:
    """Adapters on every linear layer but the head, which trains in a reward model."""
    if task.kind == "sft":
        return LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    layers = r".*\.(q|k|v|o|gate|up|down)_proj"
    return LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=layers,
        task_type="SEQ_CLS",
        modules_to_save=["score"],
    )


def options(task: Task, folder: str) -> dict[str, Any]:
    """Arguments that all trainers share."""
    rows = task.batch if task.kind == "sft" else task.batch // 2
    return {
        "output_dir": folder,
        "per_device_train_batch_size": rows,
        "max_steps": task.steps + 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "bf16": False,
    }


def plain(task: Task, folder: str) -> transformers.Trainer:
    """Make transformers' Trainer around PEFT's model."""
    is_sft = task.kind == "sft"
    module = task.language_model() if is_sft else task.classifier()
    return (PlainTrainer if is_sft else PairTrainer)(
        model=get_peft_model(module, lora(task)),
        args=transformers.TrainingArguments(**options(task, folder)),
        train_dataset=Dataset.from_list(task.answers() if is_sft else task.pairs()),
        data_collator=answers_collated if is_sft else pairs_collated,
    )


def of_trl(task: Task, folder: str) -> transformers.Trainer:
    """Make TRL's trainer."""
    import trl

    shared = options(task, folder) | {"max_length": task.length, "remove_unused_columns": True}
    if task.kind == "sft":
        rows = [
            {
                "input_ids": row["input_ids"],
                "completion_mask": [int(i >= row["start"]) for i in range(len(row["input_ids"]))],
            }
            for row in task.answers()
        ]
        kind, config = trl.SFTTrainer, trl.SFTConfig(**shared, completion_only_loss=True)
        module: Any = task.language_model()
    else:
        rows, module = task.pairs(), task.classifier()
        kind, config = trl.RewardTrainer, trl.RewardConfig(**shared)
    in_order = type("InOrder", (InOrder, kind), {})
    return in_order(
        model=module,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=lora(task),
    )


def train(task: Task, make: Any, clock: Clock) -> None:
    """Make the trainer, and have it make the steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(task, folder)
        trainer.add_callback(Ticks(clock))
        trainer.train()
    clock.first_loss = next(float(e["loss"]) for e in trainer.state.log_history if "loss" in e)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    task, make = Task.given(), {"plain": plain, "trl": of_trl}[sys.argv[2]]
    serve(task.steps, lambda clock: train(task, make, clock))
