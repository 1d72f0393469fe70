"""Judge a finished run of the embedded default more closely than its closing table does.

Samples many answers to every held-out prompt at temperature 1 and prints gold success and the
well-formed share of the SFT and the PPO model. Run it from the repository's root:

    python e2e_rlhf.py --output-dir output --seed 1
    python -m benchmarks.quickstart_gold output
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dschat.models.reward_model import create_critic_model
from dschat.quickstart.report import MODELS, held_out_prompts, judge
from dschat.text.tokenizer import load_hf_tokenizer


def main() -> None:
    """Print one line for each of the two models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--answers", type=int, default=30, help="answers to each prompt")
    parser.add_argument("--seed", type=int, default=7, help="seed of sampling")
    args = parser.parse_args()
    prompts = held_out_prompts(args.output_dir) * args.answers
    reward_dir = str(args.output_dir / "reward-models")
    reward_model = create_critic_model(reward_dir, load_hf_tokenizer(reward_dir), torch.float32)
    reward_model.eval()
    for name in ("SFT", "PPO"):
        folder = args.output_dir / MODELS[name]
        score = judge(folder, reward_model, prompts, torch.device("cpu"), args.seed).gold
        print(f"{name}: gold {score.gold:.3f}, well-formed {score.well_formed:.3f}")


if __name__ == "__main__":
    main()
