"""Plan a step before it runs: memory of each GPU by kind and role, time, cost, what to change.

    python -m dschat.plan --config dschat/recipes/opt/single_gpu/sft_6.7b_lora.yaml --gpu a6000
    python -m dschat.plan --config my.yaml --step ppo --gpu h100 --gpus 8 --nodes 2 --json
    python -m dschat.plan --script training/step3_rlhf_finetuning/training_scripts/...sh --gpu l40s
    python -m dschat.plan --config qwen3/single_gpu/8b --gpu h100

A file of several stages, as `dschat run` takes it by path or name, is planned stage by stage. Flags
after these are those of the step's main.py, and win over the recipe. Models are folders with a
config.json, or well-known names; no weights are read and nothing is downloaded. Everything is
computed: activations by running the step's own passes on tensors without data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dschat.config.cli import parse, run_cli
from dschat.config.help import OneLineParser, add_flag, program
from dschat.config.yaml_file import read_yaml
from dschat.errors import UserError
from dschat.pipeline.recipe import EMBEDDED, read, shipped
from dschat.plan.flags import PlanFlags
from dschat.plan.recipe import STEPS, AnySettings, settings_of
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
    if (named := getattr(given, "config", None)) in (known := shipped()):
        given.config = str(known[named])
    args = PlanFlags.of(**vars(given))
    stages = stages_of(args, others)
    if not stages:
        recipe, settings = settings_of(args, others)
    from dschat.plan.command import Planned, run  # here: torch, which checks of flags need not

    if not stages:
        stages = [(str(recipe), recipe, settings, args.model, args.critic)]
    run(args, [Planned(*stage) for stage in stages])


Stages = list[tuple[str, Path, AnySettings, str | None, str | None]]


def stages_of(args: PlanFlags, others: Sequence[str]) -> Stages:
    """Split a pipeline: title, recipe, settings and models of each stage; none of a recipe.

    Raises:
        UserError: it starts from a model that nobody has named.
    """
    if args.config is None or "stages" not in read_yaml(args.config):
        return []
    path = Path(args.config)
    pipeline = read(path, [], None)
    shared = pipeline.settings
    model = args.model or (None if shared.model == EMBEDDED else shared.model)
    critic = args.critic or shared.reward_model or model
    if model is None:
        raise UserError(f"config {path}: it names no model to plan for; give --model")
    stages: Stages = []
    for stage in pipeline.stages:
        if args.step in (None, stage.kind):
            settings = parse(STEPS[stage.kind], [*stage.argv, *others], None)
            own = critic if stage.kind == "reward" else model
            stages.append((f"{path}, {stage.name}", path, settings, own, critic))
    if not stages:
        kinds = ", ".join(stage.kind for stage in pipeline.stages)
        raise UserError(f"step {args.step}: {path} has none; its stages are {kinds}")
    return stages


if __name__ == "__main__":
    run_cli(main)
