"""CPU seconds of a reward model's step with the prompt of each pair once, against twice.

    python -m benchmarks.shared_prompts --model_name_or_path ../shared/models/stories260K
    python -m benchmarks.shared_prompts --hidden_size 576 --layers 2

Random tokens, forward and backward of the loss in fp32 on one thread; both ways in turns, medians.
Prints the largest difference of scores, that of all gradients together, and the seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaModel

from dschat.data.collators import PairCollator
from dschat.data.shared_prompts import shared_prompt_batch
from dschat.functional.losses import pairwise_loss
from dschat.models.reward_model import RewardModel, create_critic_model
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train.evaluation import pair_scores

SHAPES = ((384, 48, 40), (192, 64, 64), (192, 128, 112), (48, 320, 280))  # prompt, answers
PAIRS, REPEATS = 4, 5


def model_of(args: argparse.Namespace) -> RewardModel:
    """Load a model, or make one of Llama's kind with fresh weights."""
    torch.manual_seed(0)
    if args.model_name_or_path:
        tokenizer = load_hf_tokenizer(args.model_name_or_path)
        return create_critic_model(
            args.model_name_or_path, tokenizer, torch.float32, init_head=True
        )
    heads = max(args.hidden_size // 64, 1)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
    )
    return RewardModel(LlamaModel(config))


def rows_of(prompt: int, chosen: int, rejected: int) -> list[dict]:
    """Pairs of random tokens."""
    rows = []
    for _ in range(PAIRS):
        p, c, r = (torch.randint(3, 500, (n,)).tolist() for n in (prompt, chosen, rejected))
        length = prompt + max(chosen, rejected)
        pair = {"chosen_ids": p + c, "rejected_ids": p + r}
        rows.append({**pair, "prompt_len": prompt, "length": length})
    return rows


def main() -> None:
    """Measure every shape."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", help="a folder; else a fresh model")
    parser.add_argument("--hidden_size", type=int, default=576)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = model_of(args).eval()  # without dropout: both ways are compared
    for shape in SHAPES:
        rows, seconds, results = rows_of(*shape), {"twice": [], "once": []}, {}
        batches = {
            "twice": PairCollator(0)(rows),
            "once": shared_prompt_batch(rows, torch.zeros(PAIRS), 0),
        }
        for _ in range(REPEATS):
            for name, batch in batches.items():
                model.zero_grad()
                start = time.process_time()
                scores = pair_scores(model, batch)
                pairwise_loss(*scores, batch.real).backward()
                seconds[name].append(time.process_time() - start)
                gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
                results[name] = torch.cat(scores).detach(), torch.cat(gradients)
        (scores, gradients), (others, other_gradients) = results["twice"], results["once"]
        gap = ((scores - others).abs().max() / scores.abs().max()).item()
        gradient_gap = ((gradients - other_gradients).norm() / gradients.norm()).item()
        twice, once = (statistics.median(seconds[name]) for name in ("twice", "once"))
        print(
            f"prompt {shape[0]}, answers {shape[1]} and {shape[2]}: scores differ by {gap:.1e}, "
            f"gradients by {gradient_gap:.1e}; {twice:.3f} s twice, {once:.3f} s once: "
            f"{twice / once:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
