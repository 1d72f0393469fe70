"""Evaluate a reward model: the figures of step 2's evaluation, and scores of single answers.

python rw_eval.py --model_name_or_path ./output
python rw_eval.py --model_name_or_path ./output --data_path ./pairs.jsonl --show 5
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from dschat.config.cli import check_flags
    from dschat.config.programs import RewardEvaluation

    check_flags(RewardEvaluation, __doc__)

import torch

from dschat.config.cli import parse, run_cli
from dschat.config.programs import RewardEvaluation
from dschat.config.unused import tell_unused
from dschat.data.batching import build_loader
from dschat.data.collators import PairCollator
from dschat.data.datasets import create_prompt_dataset
from dschat.models.causal_lm import check_model_folder
from dschat.models.reward_model import check_reward_head, create_critic_model
from dschat.train.evaluation import evaluate_pairs, pair_scores
from dschat.train.metrics import format_value
from dschat.train.prepare import setup_run
from dschat.utils.distributed import print_rank_0


@torch.no_grad()
def main() -> None:
    """Score the evaluation pairs of the data."""
    settings = parse(RewardEvaluation, None, __doc__)
    tell_unused(settings)
    name = settings.model_name_or_path
    ctx = setup_run(name, settings, prompt_format=settings.data.prompt_format)
    tokenizer = ctx.tokenizer
    check_model_folder(name, tokenizer)
    check_reward_head(name)
    data = create_prompt_dataset(
        settings.data, tokenizer, 2, seed=settings.seed, max_seq_len=settings.max_seq_len
    )
    loader = build_loader(
        data.eval,
        PairCollator(tokenizer.pad_token_id),
        settings.batch_size,
        rank=0,
        world_size=1,
        seed=settings.seed,
        shuffle=False,
    )
    model = create_critic_model(name, tokenizer, ctx.dtype)
    model.to(ctx.device).eval()

    figures = evaluate_pairs(model, loader, ctx.device)
    print_rank_0(" | ".join(f"{name} {format_value(x)}" for name, x in figures.items()))
    collate = PairCollator(tokenizer.pad_token_id)
    for row in data.eval.select(range(min(settings.show, len(data.eval)))):
        batch = collate([row]).to(ctx.device)
        chosen, rejected = pair_scores(model, batch)
        prompt = tokenizer.decode(row["chosen_ids"][: row["prompt_len"]])
        print_rank_0(f"\nprompt: {prompt!r}")
        for name, score in (("chosen", chosen), ("rejected", rejected)):
            answer = tokenizer.decode(row[f"{name}_ids"][row["prompt_len"] :])
            print_rank_0(f"{name:>8} {score.item():8.3f}: {answer!r}")


if __name__ == "__main__":
    run_cli(main)
