"""Plan a step before it runs: memory of each GPU by kind and role, time, cost, what to change.

    python -m dschat.plan --config dschat/recipes/opt/single_gpu/sft_6.7b_lora.yaml --gpu a6000
    python -m dschat.plan --config my.yaml --step ppo --gpu h100 --gpus 8 --nodes 2 --json
    python -m dschat.plan --script training/step3_rlhf_finetuning/training_scripts/...sh --gpu l40s

Flags after these are those of the step's main.py, and win over the recipe. Models are folders with
a config.json, or well-known names; no weights are read and nothing is downloaded. Everything is
computed: activations by running the step's own passes on tensors without data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dschat.config.cli import run_cli
from dschat.config.help import OneLineParser, program
from dschat.plan.recipe import settings_of


def parser() -> argparse.ArgumentParser:
    """The flags of the planner itself."""
    flags = OneLineParser(__doc__, prog=program("dschat.plan"))
    add = flags.add_argument
    add("--config", help="recipe: a YAML file of the step's flags")
    add("--script", help="training script, in place of its recipe")
    add("--step", choices=("sft", "reward", "dpo", "ppo"), help="(default: by the recipe's name)")
    add("--gpu", default="a6000", help="by its short name (default: a6000)")
    add("--gpus", type=int, default=1, help="on each machine (default: 1)")
    add("--nodes", type=int, default=1, help="machines (default: 1)")
    add("--memory", type=float, help="GiB of a GPU, in place of the table's")
    add("--model", help="folder or name of the model, or actor (default: the recipe's)")
    add("--critic", help="folder or name of critic and reward model")
    add("--network", type=float, help="GB/s of a GPU to another machine (default: 25)")
    add("--efficiency", type=float, help="share of the peak in training (default: 0.4)")
    add("--usd_per_gpu_hour", type=float, help="price, for the cost of a step")
    add("--json", action="store_true", help="print JSON")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and print the plan."""
    args, others = parser().parse_known_args(argv)
    recipe, settings = settings_of(args, others)
    from dschat.plan.command import run  # here: it imports torch, which checks of flags need not

    run(args, recipe, settings)


if __name__ == "__main__":
    run_cli(main)
