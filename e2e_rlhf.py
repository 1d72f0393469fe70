"""Three steps in one command: supervised fine-tuning, reward model, PPO.

With no model named, the embedded default: a small model and preference data are generated into the
output folder and go through the ordinary scripts.

    python e2e_rlhf.py
    python e2e_rlhf.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m
    python e2e_rlhf.py --actor-model ./my-model --reward-model ./my-model --data-path ./pairs.jsonl

Leaves out: it does not train; it runs the steps' shell scripts, prints each command, and stops at
the first that fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from dschat.config.cli import OneLineParser, run_cli
from dschat.errors import UserError

ROOT = Path(__file__).resolve().parent
STEP_DIRS = {
    1: ROOT / "training" / "step1_supervised_finetuning",
    2: ROOT / "training" / "step2_reward_model_finetuning",
    3: ROOT / "training" / "step3_rlhf_finetuning",
}
STEP_NAMES = {1: "actor-models", 2: "reward-models", 3: "step3-models"}
FALLBACK_SIZE = {1: "1.3b", 2: "350m", 3: "1.3b"}  # whose script serves any other model


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags of DeepSpeed-Chat, and --data-path and --seed."""
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--step", type=int, nargs="+", choices=(1, 2, 3), default=(1, 2, 3), help="steps to run")
    add("--actor-model", help="size (1.3b), hub id or folder; none: the embedded default")
    add("--reward-model", help="size (350m), hub id or folder")
    add("--actor-zero-stage", default="", choices=("", "0", "1", "2", "3"), help="ZeRO stage")
    add("--reward-zero-stage", default="", choices=("", "0", "1", "2", "3"), help="ZeRO stage")
    add("--output-dir", type=lambda p: Path(p).resolve(), default=Path("./output").resolve())
    add(
        "--deployment-type",
        default="single_gpu",
        choices=("single_gpu", "single_node", "multi_node"),
        help="which scripts: one GPU, all of one machine, several machines",
    )
    add("--data-path", nargs="+", default=[], help="data of all steps instead of the scripts' own")
    add("--seed", type=int, default=1234, help="seed of all steps")
    args = parser.parse_args(argv)
    if args.actor_model is None and args.reward_model is not None:
        raise UserError("--reward-model needs --actor-model: name both, or none for the default")
    return args


def size_of(model: str) -> str | None:
    """1.3b for facebook/opt-1.3b or 1.3b; None for any other id or folder."""
    short = model.removeprefix("facebook/opt-")
    known = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
    return short if short in known else None


def script_for(step: int, model: str, deployment: str) -> tuple[Path, list[str]]:
    """Find the step's script for a model, and the flags that put the model into it."""
    folder = STEP_DIRS[step] / "training_scripts" / "opt" / deployment
    size = size_of(model)
    if size is not None and (script := folder / f"run_{size}.sh").is_file():
        return script, []
    script = folder / f"run_{FALLBACK_SIZE[step]}.sh"
    if not script.is_file():
        raise UserError(f"no script for {deployment} in step {step}: {script} does not exist")
    name = model if size is None else f"facebook/opt-{size}"
    return script, [] if step == 3 else ["--model_name_or_path", name]


def commands(args: argparse.Namespace) -> dict[int, list[str]]:
    """Build the shell command of each requested step."""
    data = [str(Path(p).resolve()) if Path(p).exists() else p for p in args.data_path]
    common = [*(["--data_path", *data] if data else []), "--seed", str(args.seed)]
    if args.actor_model is None:
        return {step: quickstart_command(step, args) for step in sorted(set(args.step))}
    actor, reward = local(args.actor_model), local(args.reward_model or "350m")
    outputs = {step: args.output_dir / STEP_NAMES[step] for step in STEP_DIRS}
    result = {}
    for step in sorted(set(args.step)):
        model = reward if step == 2 else actor
        script, named = script_for(step, model, args.deployment_type)
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
    return ["bash", str(script), *inputs[step], outputs[step], "--seed", str(args.seed)]


def local(model: str) -> str:
    """Make a folder's path absolute; ids and sizes stay."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def run_step(step: int, command: list[str]) -> float:
    """Run one step; returns its seconds, ends the program when it fails."""
    print(f"\n== step {step}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    # `python` and `deepspeed` in the scripts are those of the environment that runs this.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    code = subprocess.run(command, check=False, env=os.environ | {"PATH": path}).returncode
    seconds = time.perf_counter() - start
    if code != 0:
        print(f"error: step {step} failed with exit code {code}", file=sys.stderr)
        sys.exit(code)
    return seconds


def main() -> None:
    """Build what the default needs, run the steps, print the closing table."""
    args = parse_args()
    if args.actor_model is None:
        from dschat.quickstart import build

        build(args.output_dir, args.seed)
    seconds = {step: run_step(step, command) for step, command in commands(args).items()}
    if args.actor_model is None and set(args.step) == {1, 2, 3}:
        from dschat.quickstart.report import print_report

        print_report(args.output_dir, seconds, args.seed)
        return
    print("\n" + "\n".join(f"step {step}: {took:.0f} s" for step, took in seconds.items()))
    print(f"everything is in {args.output_dir}")


if __name__ == "__main__":
    run_cli(main)
