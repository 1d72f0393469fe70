"""Three steps in one command: supervised fine-tuning, reward model, PPO.

With no model named, the embedded default: a small model and preference data are generated into the
output folder and go through the ordinary scripts.

    python e2e_rlhf.py
    python e2e_rlhf.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m
    python e2e_rlhf.py --actor-model ./my-model --reward-model ./my-model --data-path ./pairs.jsonl
    python e2e_rlhf.py --actor-model ./my-model --data-path ./pairs.jsonl --dry-run
    python e2e_rlhf.py --actor-model ./my-model --data-path ./pairs.jsonl --save-steps 100 --resume

1. `commands`: the steps' shell scripts and their arguments
2. `check`: settings, models, rows, folders and disk of every step; where the rows are few,
   accumulation, epochs and warm-up that suit them; answers no longer than the pairs', several to
   a held-out prompt; rates that suit the models' widths
3. `run_all`: one after the other, up to the first that fails

It does not train: the scripts do. `dschat run FILE` does the same for stages that a file describes.
"""

from __future__ import annotations

if __name__ == "__main__":  # first: signals may come during the imports, which take seconds
    from dschat.train import signals
    from dschat.utils.printable import step_of_start

    signals.start()
    step_of_start("starting: libraries, then the checks of all steps")

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from dschat.config.cli import run_cli
from dschat.config.help import OneLineParser
from dschat.errors import UserError
from dschat.pipeline.ahead import check_ahead
from dschat.pipeline.closing import close
from dschat.pipeline.recipe import local
from dschat.pipeline.run import hold_output, ready_to_fork, run_all, unfinished
from dschat.pipeline.scripts import (
    FALLBACK_SIZE,
    arguments_of,
    script_for,
    size_in,
    size_of,
    widths_of,
)
from dschat.pipeline.stage import FOLDERS, PASSED, RESUME, Stage
from dschat.utils.hostfile import read_hostfile
from dschat.utils.printable import step_of_start

ROOT = Path(__file__).resolve().parent
STEP_DIRS = {
    1: ROOT / "training" / "step1_supervised_finetuning",
    2: ROOT / "training" / "step2_reward_model_finetuning",
    3: ROOT / "training" / "step3_rlhf_finetuning",
}
KINDS = {1: "sft", 2: "reward", 3: "ppo"}
STEP_NAMES = {step: FOLDERS[kind] for step, kind in KINDS.items()}
# Flags that the embedded default has no use for.
OF_A_MODEL = (
    "reward_model",
    "data_path",
    "dataset_columns",
    "actor_zero_stage",
    "reward_zero_stage",
    "deployment_type",
    "hostfile",
)
# Flags of a model's steps alone.
OF_STEPS = {"reward_model": (2,), "actor_zero_stage": (1, 3), "reward_zero_stage": (2, 3)}


def text(word: str) -> str:
    """Take a word of the command line that is not empty."""
    if not word:
        raise argparse.ArgumentTypeError("it is empty")
    return word


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags of DeepSpeed-Chat, and --data-path and --seed."""
    parser = OneLineParser(__doc__)
    add = parser.add_argument
    add("--step", type=int, nargs="+", choices=(1, 2, 3), default=(1, 2, 3), help="steps to run")
    add(
        "--actor-model", type=text, help="size (1.3b), hub id or folder; none: the embedded default"
    )
    add("--reward-model", type=text, help="size (350m), hub id or folder")
    add("--actor-zero-stage", default="", choices=("", "0", "1", "2", "3"), help="ZeRO stage")
    add("--reward-zero-stage", default="", choices=("", "0", "1", "2", "3"), help="ZeRO stage")
    add("--output-dir", type=lambda p: Path(text(p)).resolve(), default=Path("./output").resolve())
    add(
        "--deployment-type",
        default="single_gpu",
        choices=("single_gpu", "single_node", "multi_node"),
        help="which scripts: one GPU, all of one machine, several machines",
    )
    add(
        "--hostfile",
        type=lambda p: Path(text(p)).resolve(),
        help="of multi_node: a line `host slots=8` for each machine (default: /job/hostfile)",
    )
    add("--data-path", type=text, nargs="+", default=[], help="data of all steps, not the scripts'")
    add(
        "--dataset-columns",
        "--dataset_columns",
        type=text,
        nargs="+",
        default=[],
        help="which of its columns hold what: prompt=ask chosen=good rejected=bad",
    )
    add("--seed", type=int, default=1234, help="seed of all steps")
    add("--num-train-epochs", type=int, help="of all steps (default: by the rows)")
    add("--gradient-accumulation-steps", type=int, help="of all steps (default: by the rows)")
    add("--num-warmup-steps", type=int, help="of all steps (default: by the rows)")
    add("--overwrite-output-dir", action="store_true", help="replace models that are there")
    add("--save-steps", "--save_steps", type=int, help="steps between checkpoints, of all steps")
    add("--resume", action="store_true", help="go on inside the step that stopped")
    add("--dry-run", action="store_true", help="check all steps and stop")
    args = parser.parse_args(argv)
    if args.actor_model is None:
        for name in OF_A_MODEL:
            if getattr(args, name) != parser.get_default(name):
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{flag} needs --actor-model: the embedded default has models, data and "
                    "scripts of its own; name a model, or drop the flag"
                )
    return args


def unused_flags(args: argparse.Namespace) -> Iterator[str]:
    """Yield a line for each flag that was given and does nothing with these steps."""
    if args.actor_model is None:
        return  # what it has no use for is refused
    for name, steps in OF_STEPS.items():
        if getattr(args, name) and not {*steps} & {*args.step}:
            needs = " and ".join(map(str, steps))
            asked = ", ".join(map(str, sorted({*args.step})))
            yield f"--{name.replace('_', '-')} does nothing in step {asked}: it is of step {needs}"
    if args.hostfile and args.deployment_type != "multi_node":
        yield "--hostfile does nothing: it is of --deployment-type multi_node"


def borrowed(args: argparse.Namespace, step: int, command: list[str]) -> str | None:
    """Say whose script serves a model that has none of its own; None for one that has."""
    if args.actor_model is None:
        return None
    model = args.reward_model or FALLBACK_SIZE[2] if step == 2 else args.actor_model
    script = Path(command[1])
    size = size_in(script)
    if size == size_of(model):
        return None
    return (
        f"no script of its own on {script.parent.name}: {script.name} serves it, whose ZeRO stage, "
        f"adapters and batch sizes are meant for facebook/opt-{size}"
    )


def commands(args: argparse.Namespace) -> dict[int, list[str]]:
    """Build the shell command of each requested step."""
    data = [str(Path(p).resolve()) if Path(p).exists() else p for p in args.data_path]
    common = ["--data_path", *data] if data else []
    common += ["--dataset_columns", *args.dataset_columns] if args.dataset_columns else []
    common += common_flags(args)
    if args.actor_model is None:
        return {step: quickstart_command(step, args) for step in sorted(set(args.step))}
    actor, reward = local(args.actor_model), local(args.reward_model or FALLBACK_SIZE[2])
    outputs = {step: args.output_dir / STEP_NAMES[step] for step in STEP_DIRS}
    result = {}
    for step in sorted(set(args.step)):
        model = reward if step == 2 else actor
        script, named = script_for(
            STEP_DIRS[step] / "training_scripts", step, model, args.deployment_type
        )
        if step == 3:
            stages = [args.actor_zero_stage, args.reward_zero_stage]
            positional = [str(outputs[1]), str(outputs[2]), *stages, str(outputs[3])]
        else:
            stage = args.reward_zero_stage if step == 2 else args.actor_zero_stage
            positional = [str(outputs[step]), stage]
        result[step] = ["bash", str(script), *positional, *named, *common]
    return result


def quickstart_command(step: int, args: argparse.Namespace) -> list[str]:
    """Build a step's command for the embedded default, whose files `build` has written."""
    out = args.output_dir
    outputs = {number: str(out / name) for number, name in STEP_NAMES.items()}
    inputs = {
        1: [str(out / "model"), str(out / "sft")],
        2: [outputs[1], str(out / "data")],
        3: [outputs[1], outputs[2], str(out / "data")],
    }
    script = STEP_DIRS[step] / "training_scripts" / "quickstart" / "run.sh"
    return ["bash", str(script), *inputs[step], outputs[step], *common_flags(args)]


def common_flags(args: argparse.Namespace) -> list[str]:
    """Flags of main.py that every step gets."""
    flags = ["--seed", str(args.seed)]
    for name in PASSED:
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    return flags + ["--overwrite_output_dir"] * args.overwrite_output_dir + [RESUME] * args.resume


def stages(args: argparse.Namespace, plan: dict[int, list[str]]) -> list[Stage]:
    """Make stages of the steps' shell commands."""
    return [
        Stage(
            f"step {step}",
            KINDS[step],
            tuple(command),
            tuple(arguments_of(command)),
            args.output_dir / STEP_NAMES[step],
            widths_of(step, command),
            borrowed(args, step, command),
        )
        for step, command in plan.items()
    ]


def check(args: argparse.Namespace, steps: list[Stage]) -> list[Stage]:
    """Check every step, print a summary, and return the steps with the flags that suit them."""
    ranks = 1 if args.deployment_type == "single_gpu" else None
    if args.deployment_type == "multi_node" and not os.environ.get("LAUNCHER"):
        ranks = sum(read_hostfile(os.environ["HOSTFILE"]).values())
    fixed = [name for name in PASSED if getattr(args, name) is not None]
    return check_ahead(steps, args.output_dir, ranks, fixed)


def check_hostfile(args: argparse.Namespace) -> None:
    """Stop where several machines are asked for and none are named; scripts read HOSTFILE."""
    if args.deployment_type != "multi_node" or os.environ.get("LAUNCHER"):
        return
    hosts = args.hostfile or Path(os.environ.get("HOSTFILE") or "/job/hostfile").resolve()
    read_hostfile(hosts)
    os.environ["HOSTFILE"] = str(hosts)


def main() -> None:
    """Read the flags, hold the output folder, run the steps."""
    args = parse_args()
    plan = commands(args)
    check_hostfile(args)
    for line in unused_flags(args):
        print(line, flush=True)
    steps = stages(args, plan)
    hold_output(args.output_dir, steps, args.overwrite_output_dir or args.resume, dash="-")
    by_python = args.actor_model is None or os.environ.get("LAUNCHER") == "python"
    programs = [folder / "main.py" for folder in STEP_DIRS.values()]
    with ready_to_fork(by_python and not args.dry_run, programs):
        build_and_run(args, steps)


def build_and_run(args: argparse.Namespace, steps: list[Stage]) -> None:
    """Build what the default needs, check, run the steps, print the closing table."""
    every = steps
    if args.actor_model is None:
        from dschat.quickstart import build

        step_of_start("making a small model and its data")
        build(args.output_dir, args.seed)
    if args.resume:
        steps = unfinished(steps)
    steps = check(args, steps)
    if not args.dry_run:
        close(args.output_dir, every, run_all(steps), args.seed, embedded=args.actor_model is None)


if __name__ == "__main__":
    run_cli(main)
