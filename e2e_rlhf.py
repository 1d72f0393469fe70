"""Three steps in one command: supervised fine-tuning, reward model, PPO.

With no model named, the embedded default: a small model and preference data are generated into the
output folder and go through the ordinary scripts.

    python e2e_rlhf.py
    python e2e_rlhf.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m
    python e2e_rlhf.py --actor-model ./my-model --reward-model ./my-model --data-path ./pairs.jsonl
    python e2e_rlhf.py --actor-model ./my-model --data-path ./pairs.jsonl --dry-run
    python e2e_rlhf.py --actor-model ./my-model --data-path ./pairs.jsonl --save-steps 100 --resume

1. `commands`: the steps' shell scripts and their arguments
2. `check_ahead`: settings, models, rows, folders and disk of every step; where the rows are few,
   accumulation, epochs and warm-up that suit them; rates that suit the models' widths
3. `run_step`: one after the other, up to the first that fails

Leaves out: it does not train; the scripts do.
"""

from __future__ import annotations

if __name__ == "__main__":  # first: signals may come during the imports, which take seconds
    from dschat.train import signals

    signals.start()

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dschat.config.cli import run_cli
from dschat.config.help import OneLineParser
from dschat.errors import UserError
from dschat.train import launch, run_lock, signals

ROOT = Path(__file__).resolve().parent
STEP_DIRS = {
    1: ROOT / "training" / "step1_supervised_finetuning",
    2: ROOT / "training" / "step2_reward_model_finetuning",
    3: ROOT / "training" / "step3_rlhf_finetuning",
}
STEP_NAMES = {1: "actor-models", 2: "reward-models", 3: "step3-models"}
FALLBACK_SIZE = {1: "1.3b", 2: "350m", 3: "1.3b"}  # whose script serves any other model
# Hidden sizes of the models that a script's learning rates are meant for, by their sizes.
WIDTHS = {"350m": 1024, "1.3b": 2048, "6.7b": 4096, "13b": 5120, "30b": 7168, "66b": 9216}
CRITIC_WIDTH = 1024
# Flags of main.py in every step, where given.
PASSED = ("num_train_epochs", "gradient_accumulation_steps", "num_warmup_steps", "save_steps")
RESUME = ["--resume"]
# Flags that the embedded default has no use for.
OF_A_MODEL = (
    "reward_model",
    "data_path",
    "actor_zero_stage",
    "reward_zero_stage",
    "deployment_type",
    "hostfile",
)
# What a script calls, in `arguments_of`: nothing is made, printed or started.
STAND_INS = {"mkdir": ":"} | dict.fromkeys(
    ("deepspeed", "python"), 'printf "%s\\0" "$@" > "$WORDS"'
)


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
        default=Path(os.environ.get("HOSTFILE") or "/job/hostfile").resolve(),
        help="of multi_node: a line `host slots=8` for each machine",
    )
    add("--data-path", type=text, nargs="+", default=[], help="data of all steps, not the scripts'")
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


def size_of(model: str) -> str | None:
    """1.3b for facebook/opt-1.3b or 1.3b; None for any other id or folder."""
    short = model.removeprefix("facebook/opt-")
    known = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
    return short if short in known else None


def script_for(step: int, model: str, deployment: str) -> tuple[Path, list[str]]:
    """Find the step's script for a model, and the flags that put the model into it."""
    folder = STEP_DIRS[step] / "training_scripts" / "opt" / deployment
    size = size_of(model)
    for name in (f"run_{size}.sh", f"run_{size}_lora.sh"):
        if size is not None and (script := folder / name).is_file():
            return script, []
    script = folder / f"run_{FALLBACK_SIZE[step]}.sh"
    if not script.is_file():
        raise UserError(
            f"--deployment-type {deployment}: step {step} has no script for {model} there "
            f"(training_scripts/opt/{deployment}); choose single_gpu or single_node, or start "
            "its main.py under deepspeed --hostfile"
        )
    name = model if size is None else f"facebook/opt-{size}"
    return script, [] if step == 3 else ["--model_name_or_path", name]


def size_in(script: Path) -> str:
    """1.3b for run_1.3b.sh and run_1.3b_lora.sh."""
    return script.stem.removeprefix("run_").removesuffix("_lora")


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
    common = [*(["--data_path", *data] if data else []), *common_flags(args)]
    if args.actor_model is None:
        return {step: quickstart_command(step, args) for step in sorted(set(args.step))}
    actor, reward = local(args.actor_model), local(args.reward_model or FALLBACK_SIZE[2])
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
    return ["bash", str(script), *inputs[step], outputs[step], *common_flags(args)]


def widths_of(step: int, command: list[str]) -> dict[str, int]:
    """Hidden sizes that the rates in a step's script are meant for; none of the quickstart's."""
    width = WIDTHS.get(size_in(Path(command[1])))
    if width is None:
        return {}
    return {"actor_": width, "critic_": CRITIC_WIDTH} if step == 3 else {"": width}


def common_flags(args: argparse.Namespace) -> list[str]:
    """Flags of main.py that every step gets."""
    flags = ["--seed", str(args.seed)]
    for name in PASSED:
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    return flags + ["--overwrite_output_dir"] * args.overwrite_output_dir + RESUME * args.resume


def arguments_of(command: list[str]) -> list[str]:
    """Words that a script hands to main.py; it runs with launchers that only write them down."""
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder, "words")
        for name, body in STAND_INS.items():
            program = Path(folder, name)
            program.write_text(f"#!/bin/sh\n{body}\n")
            program.chmod(0o755)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "WORDS": str(words), "LAUNCHER": "python"}
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        arguments = words.read_text(encoding="utf-8").split("\0")[:-1]
    start = next(i for i, word in enumerate(arguments) if word.endswith("main.py"))
    return arguments[start + 1 :]


def check_ahead(args: argparse.Namespace, plan: dict[int, list[str]]) -> dict[int, list[str]]:
    """Check every step, print a summary, and return the commands with the flags that suit it."""
    import torch

    from dschat.config.preflight import look_ahead
    from dschat.train.disk import check_disk, free_bytes, in_words
    from dschat.utils.distributed import Distributed

    count = 1 if args.deployment_type == "single_gpu" else max(torch.cuda.device_count(), 1)
    process = Distributed(0, count, 0, torch.device("cpu"))
    fixed = [name for name in PASSED if getattr(args, name) is not None]
    stand_ins: dict[str, str] = {}
    written, result = [], {}
    print("checking all steps", flush=True)
    for step, command in plan.items():
        argv = arguments_of(command)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                ahead = look_ahead(step, argv, stand_ins, process, fixed, widths_of(step, command))
        except UserError as error:
            raise UserError(f"step {step}: {error}") from error
        flags = [word for name, value in ahead.flags.items() for word in (f"--{name}", str(value))]
        result[step] = [*command, *flags]
        written += ahead.written
        if step < 3:
            stand_ins[str(args.output_dir / STEP_NAMES[step])] = ahead.model
        steps = ahead.length.steps
        print(f"step {step}: {ahead.model}, {ahead.rows} rows, {steps} optimizer steps")
        if line := borrowed(args, step, command):
            print(f"  {line}")
        if flags:
            print(f"  chosen by rows and model: {' '.join(flags)}")
        for line in ahead.length.advice():
            print(f"  {line}")
    check_disk(str(args.output_dir), written, checkpoints=0)
    size, free = in_words(sum(w.folders for w in written)), in_words(free_bytes(args.output_dir))
    print(f"model folders: {size}, of {free} free in {args.output_dir}", flush=True)
    return result


def local(model: str) -> str:
    """Make a folder's path absolute; ids and sizes stay."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def check_hostfile(args: argparse.Namespace) -> None:
    """Stop where several machines are asked for and none are named; scripts read HOSTFILE."""
    if args.deployment_type != "multi_node" or os.environ.get("LAUNCHER"):
        return
    if not args.hostfile.is_file():
        raise UserError(
            f"--hostfile {args.hostfile}: no such file; name one, with a line `host slots=8` for "
            "each machine"
        )
    os.environ["HOSTFILE"] = str(args.hostfile)


def prepare_output_dir(args: argparse.Namespace) -> None:
    """Make and hold the output folder; stop where that cannot be, or a model would be replaced."""
    place = f"--output-dir {args.output_dir}"
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}; give a folder") from error
    run_lock.hold(args.output_dir)
    for step in () if args.overwrite_output_dir or args.resume else args.step:
        if finished(args.output_dir, step):
            raise UserError(
                f"{place}: {args.output_dir / STEP_NAMES[step]} holds a finished model; give "
                "another --output-dir, or --overwrite-output-dir to replace it"
            )


def finished(output_dir: Path, step: int) -> bool:
    """Tell whether a step has written its model, and no run of it was stopped after that."""
    from dschat.models.save_plan import holds_model
    from dschat.train.checkpoint_folder import RECORD, checkpoints_in, folder_of

    folder = output_dir / STEP_NAMES[step]
    model = folder / "actor" if step == 3 else folder
    if not holds_model(model):
        return False
    written = max(path.stat().st_mtime for path in model.iterdir())
    saved = checkpoints_in(folder_of(folder)).values()
    return all((path / RECORD).stat().st_mtime <= written for path in saved)


def run_step(step: int, command: list[str]) -> float:
    """Run one step; returns its seconds, ends the program when it fails or a signal stops it."""
    print(f"\n== step {step}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    # `python` and `deepspeed` in the scripts are those of the environment that runs this.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    code = launch.run(command, environ=os.environ | {"PATH": path})
    seconds = time.perf_counter() - start
    if code == signals.STOPPED:  # the step has said how to go on
        sys.exit(code)
    if code != 0:
        print(f"error: step {step} failed with exit code {code}", file=sys.stderr)
        sys.exit(code)
    return seconds


def main() -> None:
    """Build what the default needs, check, run the steps, print the closing table."""
    args = parse_args()
    plan = commands(args)
    check_hostfile(args)
    prepare_output_dir(args)
    if args.actor_model is None:
        from dschat.quickstart import build

        build(args.output_dir, args.seed)
    for step in [step for step in plan if args.resume and finished(args.output_dir, step)]:
        print(f"step {step}: finished before, its model is in {args.output_dir / STEP_NAMES[step]}")
        del plan[step]
    plan = check_ahead(args, plan)
    if args.dry_run:
        return
    signals.restore()  # from here they are the steps'
    seconds = {step: run_step(step, command) for step, command in plan.items()}
    if args.actor_model is None and set(seconds) == {1, 2, 3}:
        from dschat.quickstart.report import print_report

        print_report(args.output_dir, seconds, args.seed)
        return
    print("\n" + "\n".join(f"step {step}: {took:.0f} s" for step, took in seconds.items()))
    print(f"everything is in {args.output_dir}")


if __name__ == "__main__":
    run_cli(main)
