"""One case: its folders, its program in a process of its own, and what came of it."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu_day.cases import Case, shape_of
from dschat.command.registry import COMMANDS
from dschat.config.cli import parse
from dschat.plan.memory import plan_memory
from dschat.plan.recipe import STEPS, AnySettings
from dschat.plan.shapes import config_of
from dschat.plan.states import WEIGHTS
from dschat.quickstart.model import build_tokenizer, corpus
from dschat.utils.gpus import gpu_of_device

WORKER = Path(__file__).with_name("worker.py")
STEPS_RUN, SKIPPED = 6, 2  # steps of a case; the first ones, which warm up, do not count
SPEEDS = ("tokens_per_s", "answer_tokens_per_s", "seconds_per_step")


@dataclass(frozen=True)
class Machine:
    """Where it runs, and where its files go.

    Attributes:
        device: by the name that CUDA gives it; None: a CPU. rows: of a batch. length: tokens.
    """

    folder: Path
    device: str | None
    dtype: str = "bf16"
    rows: int = 8
    length: int = 512


@dataclass(frozen=True)
class Figures:
    """What was measured and planned; None where this machine, or this program, tells none.

    Attributes:
        mfu, bandwidth: shares of the device's peaks. peak, planned: GiB.
        error: why the program ended; then there is nothing else.
    """

    case: str
    speeds: dict[str, float] = field(default_factory=dict)
    mfu: float | None = None
    bandwidth: float | None = None
    peak: float | None = None
    planned: float | None = None
    error: str | None = None


def run_case(case: Case, machine: Machine) -> Figures:
    """Run a case, and read its metrics and its process's memory."""
    output = machine.folder / "runs" / case.name.replace(" ", "-").replace(",", "")
    shutil.rmtree(output, ignore_errors=True)
    words = flags_of(case, machine, output)
    program = str(COMMANDS[case.program].file)
    report = machine.folder / "memory.json"
    command = [sys.executable, str(WORKER), str(report), program, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        line = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        return Figures(case.name, error=line)
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    rows = [line for line in lines if line.get("kind") == "train"][SKIPPED:]
    return figures(case, machine, rows, done.stdout, json.loads(report.read_text()), words)


def figures(
    case: Case,
    machine: Machine,
    rows: list[dict[str, Any]],
    printed: str,
    memory: dict[str, float],
    words: list[str],
) -> Figures:
    """Reduce the lines of a run to its figures."""
    settings: AnySettings = parse(STEPS[case.program], words, None)
    names = ("actor", "critic") if case.program == "ppo" else ("",)
    found = {n: getattr(settings, f"{n}_model_name_or_path".lstrip("_"), None) for n in names}
    if case.program == "ppo":
        found = {n: getattr(settings.roles, f"{n}_model_name_or_path") for n in names}
    configs = {n or "model": config_of(folder) for n, folder in found.items() if folder}
    if "critic" in configs:
        configs["reward"] = configs["critic"]
    plan = plan_memory(settings, configs, machine.dtype, ranks=1)
    weights = plan.roles["actor" if case.program == "ppo" else "model"].states.held[WEIGHTS]
    speeds = {
        name: statistics.median(row[name] for row in rows)
        for name in SPEEDS
        if rows and name in rows[0]
    }
    mfu = re.findall(r"MFU ([\d.]+) % \(exact", printed)
    gpu = gpu_of_device(machine.device)
    share = None
    if case.decoded and gpu is not None and gpu.bandwidth and rows:
        seconds = statistics.median(row["seconds/generation"] for row in rows)
        share = weights * case.decoded / seconds / (gpu.bandwidth * 1e9)
    return Figures(
        case.name,
        speeds,
        float(mfu[-1]) / 100 if mfu else None,
        share,
        memory["peak"] / 2**30 if memory["peak"] else None,
        plan.total / 2**30,
    )


def flags_of(case: Case, machine: Machine, output: Path) -> list[str]:
    """Make the models and rows of a case where they are missing; return its command line."""
    words = [*case.flags, "--dtype", machine.dtype, "--output_dir", str(output)]
    words += ["--data_path", str(_rows(machine)), "--log_every", "1", "--num_warmup_steps", "0"]
    words += ["--data_output_path", str(machine.folder / "cache"), "--max_steps", str(STEPS_RUN)]
    for setting, shape in case.models.items():
        folder = machine.folder / "runs" / shape.removeprefix("case:").replace(" ", "-")
        if not shape.startswith("case:"):
            folder = _model(machine, shape)
        words += [f"--{setting}", str(folder)]
    if case.program != "ppo":
        words += ["--per_device_train_batch_size", str(machine.rows)]
        return [*words, "--max_seq_len", str(machine.length), "--max_eval_samples", "8"]
    words += ["--max_prompt_seq_len", str(machine.length // 2), "--max_eval_samples", "8"]
    words += ["--max_answer_seq_len", str(case.decoded)]
    words += ["--per_device_generation_batch_size", str(machine.rows)]
    return [*words, "--per_device_training_batch_size", str(machine.rows)]


def _model(machine: Machine, shape: str) -> Path:
    """Folder of random weights of a shape, with a small tokenizer."""
    folder = machine.folder / "models" / shape
    if not (folder / "config.json").exists():
        tokenizer, config = build_tokenizer(corpus()), shape_of(shape)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        torch.manual_seed(0)
        dtype = torch.float32 if machine.dtype == "fp32" else torch.bfloat16
        with torch.device("cpu" if machine.device is None else "cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        if machine.device is not None:
            torch.cuda.empty_cache()
    return folder


def _rows(machine: Machine) -> Path:
    """Preferences of about the full length."""
    path = machine.folder / "rows.jsonl"
    if not path.exists():
        words = [text.strip() for text in corpus()]
        texts = [" ".join(words[(i * 7 + j) % len(words)] for j in range(64)) for i in range(600)]
        long = [{"prompt": t[:600], "chosen": t[600:1800], "rejected": t[300:1500]} for t in texts]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in long), encoding="utf-8")
    return path
