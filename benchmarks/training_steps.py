"""Optimizer steps of 1, 2 and DPO, with and without the mask that right-padded rows do not need.

    nice python -m benchmarks.training_steps
    nice python -m benchmarks.training_steps --vocabulary 50272 --rounds 7

A Llama of 4.7 million trunk weights, random, with LoRA of rank 16 on every linear layer, and random
rows of 60 to 100 % of `--length`. The variants take turns in one process, so that whatever else the
machine does hits both; a figure is the median of a round's CPU seconds, a ratio the median of the
rounds' ratios with the smallest and the largest beside it. No engine is around the model.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dschat.data.batches import PairBatch
from dschat.data.collators import PairCollator, SFTCollator
from dschat.functional.losses import pairwise_loss
from dschat.models import right_padding
from dschat.models.reward_model import RewardModel
from dschat.train.evaluation import answer_loss, pair_scores
from dschat.train.pair_logprobs import pair_logprobs
from dschat.utils.module.lora import convert_linear_layer_to_lora, only_optimize_lora_parameters
from dschat.utils.module.lora_config import LoraConfig

PAD = 0
Loss = Callable[[], torch.Tensor]


def language_model(vocabulary: int, length: int) -> LlamaForCausalLM:
    """The model without adapters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=length,
    )
    return LlamaForCausalLM(config)


def adapted(module: nn.Module) -> nn.Module:
    """Add adapters; they and a reward head train."""
    convert_linear_layer_to_lora(module, LoraConfig(lora_dim=16))
    only_optimize_lora_parameters(module)
    if isinstance(module, RewardModel):
        module.v_head.requires_grad_(True)
    return module.train()


def rows(count: int, vocabulary: int, length: int) -> list[list[int]]:
    """Random ids of 60 to 100 % of a length, the first row of all of it."""
    lengths = [length, *torch.randint(length * 3 // 5, length, (count - 1,)).tolist()]
    return [torch.randint(3, vocabulary, (n,)).tolist() for n in lengths]


def pairs(batch_size: int, vocabulary: int, length: int) -> PairBatch:
    """Pairs whose last third is the answer."""
    sides = rows(2 * batch_size, vocabulary, length)
    return PairCollator(PAD)(
        [
            {"chosen_ids": chosen, "rejected_ids": rejected, "prompt_len": length * 2 // 5}
            for chosen, rejected in zip(sides[::2], sides[1::2], strict=True)
        ]
    )


def steps(args: argparse.Namespace) -> dict[str, tuple[nn.Module, Loss]]:
    """A model of each step, and what gives the loss of its next optimizer step."""
    size = args.vocabulary, args.length
    sft, dpo = (adapted(language_model(*size)) for _ in range(2))
    reward = adapted(RewardModel(language_model(*size).model))
    trained = [
        {"input_ids": ids, "trained": [len(ids) * 2 // 3, len(ids)], "length": len(ids)}
        for ids in rows(args.batch, *size)
    ]
    answers, preferred = SFTCollator(PAD)(trained), pairs(args.batch // 2, *size)

    def preference_loss() -> torch.Tensor:
        chosen, rejected = pair_logprobs(dpo, preferred)
        return -nn.functional.logsigmoid(0.1 * (chosen - rejected)).sum()

    def reward_loss() -> torch.Tensor:
        return pairwise_loss(*pair_scores(reward, preferred), preferred.real)

    return {
        "SFT": (sft, lambda: answer_loss(sft, answers)),
        "reward model": (reward, reward_loss),
        "DPO, without its reference": (dpo, preference_loss),
    }


def masked(model: nn.Module) -> contextlib.AbstractContextManager:
    """Have right-padded rows masked, as a model needs that sees what follows."""
    return patch.object(right_padding, "_NEEDS_MASK", {model: True})


def cpu_seconds(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer) -> float:
    """CPU seconds of one optimizer step."""
    start = time.process_time()
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def compare(name: str, model: nn.Module, loss: Loss, rounds: int) -> str:
    """One row of the table."""
    trained = [p for p in model.parameters() if p.requires_grad]
    step = functools.partial(cpu_seconds, model, loss, torch.optim.AdamW(trained, lr=1e-5))
    variants = {"masked": masked(model), "unmasked": contextlib.nullcontext()}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(rounds + 1):  # the first warms up
        for variant, context in variants.items():
            with context:
                taken = step()
            if turn:
                seconds[variant].append(taken)
    ratios = [a / b for a, b in zip(seconds["masked"], seconds["unmasked"], strict=True)]
    before, after = (statistics.median(seconds[variant]) for variant in variants)
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    return f"| {name} | {before:.2f} | {after:.2f} | {low:.2f} / **{middle:.2f}** / {high:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    print("| step | masked, CPU s | unmasked, CPU s | times faster |\n| --- | --- | --- | --- |")
    for name, (model, loss) in steps(args).items():
        print(compare(name, model, loss, args.rounds), flush=True)


if __name__ == "__main__":
    main()
