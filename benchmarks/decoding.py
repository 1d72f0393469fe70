"""Rollout engines against transformers' `generate`, on one set of prompts.

    python -m benchmarks.decoding --model ./stories260K
    python -m benchmarks.decoding --hidden 256 --layers 6 --rows 8 --threads 1

The model carries an adapter of rank 16 on all linear layers, as an actor does; "generate" is what
transformers brings. All engines get the same prompts and sample at temperature 1; every round each
of them takes its turn, so that whatever else the machine does hits all. A ratio is the speed of a
turn over that of "generate" in the same round, in answer tokens a second, by CPU time and by wall
time; given are the medians of all rounds, and the least and the largest of the CPU ratios. "merged"
folds the adapter into the weights for the rollout, which is part of its time. `--end TEXT` makes
another token end answers, so that they have lengths of their own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dschat.data.batches import PromptBatch
from dschat.functional.returns import answer_mask_from
from dschat.rlhf.answering import start_sorted
from dschat.rlhf.generation import SamplingConfig
from dschat.rlhf.rollout_engine import RolloutEngine, TransformersRollout
from dschat.rlhf.static_model import StaticModel
from dschat.rlhf.static_rollout import StaticRollout
from dschat.utils.module.lora import convert_linear_layer_to_lora, lora_layers
from dschat.utils.module.lora_config import LoraConfig

RANK, BASELINE = 16, "generate"
HEADERS = ("engine", "tokens/s", "CPU ratio", "least", "largest", "wall ratio", "passes")


@dataclass(frozen=True)
class Turn:
    """What one engine took for all prompts."""

    tokens: int
    passes: int
    cpu: float
    wall: float


def main() -> None:
    """Measure, and print a table."""
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = _model(args)
    prompts, sampling = _prompts(args, tokenizer), SamplingConfig(args.answer_tokens)

    def turn(engine: RolloutEngine) -> Turn:
        cpu, wall = time.process_time(), time.perf_counter()
        made = start_sorted(engine, prompts, sampling, args.rows, tokenizer.pad_token_id)()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        tokens = int(answer_mask_from(made.answers, tokenizer.eos_token_id).sum())
        return Turn(tokens, made.steps, cpu, wall)

    engines = {
        BASELINE: TransformersRollout(model, tokenizer),
        "generate, merged": TransformersRollout(model, tokenizer, fuse_adapters=True),
        "static, unrecorded": StaticRollout(
            StaticModel(model, records=False), tokenizer, args.rows
        ),
        "static": StaticRollout(StaticModel(model), tokenizer, args.rows),
        "static, merged": StaticRollout(StaticModel(model), tokenizer, args.rows, True),
    }
    for engine in engines.values():  # also what a run pays once
        turn(engine)
    rounds = [{name: turn(engine) for name, engine in engines.items()} for _ in range(args.rounds)]
    size = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    print(
        f"{size:,} parameters, {len(prompts.real)} prompts of {args.prompt_tokens} tokens or "
        f"fewer, each {args.copies} times, {args.rows} rows at a time, answers of up to "
        f"{args.answer_tokens}, {args.threads} threads, {args.rounds} rounds\n"
    )
    print(table(rounds))


def table(rounds: list[dict[str, Turn]]) -> str:
    """Make a Markdown table of medians over the rounds."""

    def ratios(name: str, seconds: Callable[[Turn], float]) -> list[float]:
        def speed(turn: Turn) -> float:
            return turn.tokens / seconds(turn)

        return [speed(r[name]) / speed(r[BASELINE]) for r in rounds]

    lines = ["| " + " | ".join(HEADERS) + " |", "| --- " * len(HEADERS) + "|"]
    for name in rounds[0]:
        cpu, wall = ratios(name, lambda t: t.cpu), ratios(name, lambda t: t.wall)
        rate = statistics.median(r[name].tokens / r[name].cpu for r in rounds)
        passes = statistics.median(r[name].passes for r in rounds)
        figures = (statistics.median(cpu), min(cpu), max(cpu), statistics.median(wall))
        cells = [name, f"{rate:,.0f}", *(f"{x:.2f}" for x in figures), f"{passes:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _model(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Give the model with an adapter that is not zero, and a tokenizer or what stands in for it."""
    torch.manual_seed(0)
    if args.model is None:
        shape = {"hidden_size": args.hidden, "num_hidden_layers": args.layers}
        config = LlamaConfig(
            vocab_size=args.vocabulary,
            intermediate_size=args.hidden * 11 // 4,
            num_attention_heads=args.hidden // 32,
            num_key_value_heads=args.hidden // 32,
            **shape,
        )
        model: Any = LlamaForCausalLM(config)
        tokenizer: Any = SimpleNamespace(eos_token_id=2, pad_token_id=0)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=False)
        loaded = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        end = loaded.eos_token_id
        if args.end is not None:
            (end,) = loaded(args.end, add_special_tokens=False).input_ids[-1:]
        tokenizer = SimpleNamespace(eos_token_id=end, pad_token_id=loaded.pad_token_id or 0)
    convert_linear_layer_to_lora(model, LoraConfig(lora_dim=RANK))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.get_parameter("lora_B"), std=0.002)
    return model.eval(), tokenizer


def _prompts(args: argparse.Namespace, tokenizer: Any) -> PromptBatch:
    """Random ids, a quarter to all of the width long, padded on the left."""
    count, width = args.prompts, args.prompt_tokens
    ids = torch.randint(3, min(500, args.vocabulary), (count, width))
    lengths = torch.randint(width // 4, width + 1, (count, 1))
    mask = torch.arange(width) >= width - lengths
    ids = ids.masked_fill(~mask, tokenizer.pad_token_id)
    columns = (x.repeat_interleave(args.copies, 0) for x in (ids, mask, mask.any(-1)))
    return PromptBatch(*columns)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder (default: random weights of the shape below)")
    parser.add_argument("--end", help="text whose last token ends an answer")
    for name, default in {
        "hidden": 256,
        "layers": 6,
        "vocabulary": 4096,
        "prompts": 32,
        "copies": 2,
        "rows": 16,
        "prompt_tokens": 32,
        "answer_tokens": 48,
        "rounds": 5,
        "threads": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


if __name__ == "__main__":
    main()
