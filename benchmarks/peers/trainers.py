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

from benchmarks.peers.task import (
    ANSWER,
    ANSWERS,
    KL,
    PAD,
    RANK,
    Task,
    Turns,
    tokenizer,
    variety,
)


class Ticks(transformers.TrainerCallback):
    """Tells the turns of each optimizer step, once its loss is logged."""

    def __init__(self, turns: Turns):
        self.turns = turns

    def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """See Trainer."""
        if "loss" in logs:
            self.turns.first_loss = self.turns.first_loss or float(logs["loss"])
            self.turns.step_made()


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
    if task.kind == "reward":
        layers = r".*\.(q|k|v|o|gate|up|down)_proj"
        extra: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    else:
        layers, extra = "all-linear", {"task_type": "CAUSAL_LM"}
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, **extra)


def options(task: Task, folder: str) -> dict[str, Any]:
    """Arguments that all trainers share."""
    rows = task.batch // 2 if task.kind in ("reward", "dpo") else task.batch
    return {
        "output_dir": folder,
        "per_device_train_batch_size": rows,
        "max_steps": task.all_steps,
        "learning_rate": task.rate,
        "lr_scheduler_type": task.schedule,
        "warmup_steps": task.warm_up,
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

    if task.kind in ("grpo", "rloo"):
        return sampling(task, folder)
    shared = options(task, folder) | {"max_length": task.length, "remove_unused_columns": True}
    module: Any = task.classifier() if task.kind == "reward" else task.language_model()
    more: dict[str, Any] = {}
    if task.kind == "sft":
        rows = [
            {
                "input_ids": row["input_ids"],
                "completion_mask": [int(i >= row["start"]) for i in range(len(row["input_ids"]))],
            }
            for row in task.answers()
        ]
        kind, config = trl.SFTTrainer, trl.SFTConfig(**shared, completion_only_loss=True)
    elif task.kind == "reward":
        rows, kind, config = task.pairs(), trl.RewardTrainer, trl.RewardConfig(**shared)
    else:
        rows, kind, config = task.preferences(), trl.DPOTrainer, trl.DPOConfig(**shared)
        more = {"_prepare_dataset": lambda self, dataset, *args: dataset}  # it is tokenised
    return type("InOrder", (InOrder, kind), more)(
        model=module,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=lora(task),
    )


def rewards(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Give the rewards that the recipe has from `variety`."""
    return [variety(*pair) for pair in zip(prompts, completions, strict=True)]


def sampling(task: Task, folder: str) -> transformers.Trainer:
    """Make TRL's trainer of GRPO or RLOO; answers have one length."""
    import trl

    kind, settings = {
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    }[task.kind]
    config = settings(
        **options(task, folder),
        num_generations=ANSWERS,
        max_completion_length=ANSWER,
        generation_kwargs={"min_new_tokens": ANSWER},
        top_k=0,
        beta=KL,
    )
    texts = task.prompts(task.all_steps * task.batch // ANSWERS)
    return kind(
        model=task.language_model(),
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=tokenizer(task.vocabulary),
        peft_config=lora(task),
    )


def train(task: Task, make: Any) -> None:
    """Make the trainer, and have it make the steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(task, folder)
        trainer.add_callback(Ticks(Turns(task.steps)))
        trainer.train()
        if task.output:
            trainer.model.merge_and_unload().save_pretrained(task.output)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    train(Task.given(), {"plain": plain, "trl": of_trl}[sys.argv[2]])
