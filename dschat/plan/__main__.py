"""Plan a step before it runs: memory of each GPU by kind and role, time, cost, what to change.

    python -m dschat.plan --config dschat/recipes/opt/single_gpu/sft_6.7b_lora.yaml --gpu a6000
    python -m dschat.plan --config my.yaml --step ppo --gpu h100 --gpus 8 --nodes 2 --json
    python -m dschat.plan --script training/step3_rlhf_finetuning/training_scripts/...sh --gpu l40s

Flags after these are those of the step's main.py, and win over the recipe. Models are folders with
a config.json, or well-known names; no weights are read and nothing is downloaded. Everything is
computed: activations by running the step's own passes on tensors without data.
"""

from __future__ import annotations

from collections.abc import Sequence

from dschat.config.cli import run_cli
from dschat.config.help import OneLineParser, add_flag, program
from dschat.plan.flags import PlanFlags
from dschat.plan.recipe import settings_of
from dschat.settings import flags_of


def parser() -> OneLineParser:
    """Build the parser of the planner's own flags."""
    flags = OneLineParser(__doc__, prog=program("dschat.plan"))
    for flag in flags_of(PlanFlags):
        add_flag(flags, flag)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and print the plan."""
    given, others = parser().parse_known_args(argv)
    args = PlanFlags.of(**vars(given))
    recipe, settings = settings_of(args, others)
    from dschat.plan.command import run  # here: it imports torch, which checks of flags need not

    run(args, recipe, settings)


if __name__ == "__main__":
    run_cli(main)
