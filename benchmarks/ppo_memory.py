"""Peak memory and time of PPO with four trunks, two, and one; model states by role from shapes.

    python -m benchmarks.ppo_memory
    python -m benchmarks.ppo_memory --device cuda --hidden 2048 --layers 24 --iterations 10
    python -m benchmarks.ppo_memory --table --zero_stage 3 --ranks 4

A base of random weights and two adapters on it, an actor's and a reward model's, are written to a
temporary folder. Each layout then runs the same iterations of PPO with the same seed in a process
of its own, in turns: all of them once, then all of them again. Held is what loading has taken, peak
the most that rollouts and updates need at a time, both beyond what the process took before it
loaded: of PyTorch's allocator on a GPU, of resident memory on a CPU (Linux; weights are mapped from
files there, so that what is held before they are first used says little). Figures are medians over
the turns, times those of all iterations but the first; CPU seconds, of all the process's threads,
are what a machine that others use as well gives to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.ppo_states import Options, table
from dschat.data.batches import PromptBatch
from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.models.save_plan import plan_saving
from dschat.quickstart.model import build_tokenizer, corpus
from dschat.rlhf.part_config import SamplingConfig
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.role_setup import FrozenConfig, RoleConfig, RoleSetup
from dschat.rlhf.static_model import StaticModel
from dschat.rlhf.static_rollout import StaticRollout
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train.engine import torch_dtype
from dschat.train.model_config import ModelConfig
from dschat.utils.distributed import Distributed, init_distributed, set_random_seed
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.schedules import schedule_factory

LAYOUTS = {"none": "four trunks", "auto": "two trunks", "all": "one trunk"}
MIB = 2**20
SEED = 1234


def write_folders(args: argparse.Namespace, folder: Path) -> int:
    """`base`, `actor` and `reward` on it; how many parameters the base has."""
    tokenizer, dtype = build_tokenizer(corpus()), torch_dtype(args.dtype)
    set_random_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=max(args.vocabulary, len(tokenizer)),
            hidden_size=args.hidden,
            intermediate_size=4 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=max(args.hidden // 64, 1),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    base = str(folder / "base")
    model.to(dtype).save_pretrained(base)
    tokenizer.save_pretrained(base)
    alone, lora = Distributed(0, 1, 0, torch.device("cpu")), LoraConfig(lora_dim=args.lora_dim)
    for name in ("actor", "reward"):
        adapted = (
            create_hf_model(base, tokenizer, dtype)
            if name == "actor"
            else create_critic_model(base, tokenizer, dtype, init_head=True)
        )
        ModelConfig(lora=lora).apply(adapted)
        out = folder / name
        plan = plan_saving("adapter", base, lora, train_base=False, output_dirs=[out])
        save_hf_format(adapted, tokenizer, out, alone, plan)
    return sum(p.numel() for p in model.parameters())


def role_setup(args: argparse.Namespace, folder: Path, layout: str) -> RoleSetup:
    """All roles from the two adapter folders."""
    engine = EngineConfig(zero_stage=0, dtype=args.dtype, micro_batch_size=args.batch)
    config = ModelConfig(
        optimizer=OptimizerConfig(1e-5),
        lora=LoraConfig(lora_dim=args.lora_dim),
        gradient_checkpointing=args.gradient_checkpointing,
    )
    schedule = schedule_factory("constant", 0, args.iterations)
    actor, critic = (
        RoleConfig(str(folder / name), engine, config, schedule) for name in ("actor", "reward")
    )
    return RoleSetup(actor, critic, FrozenConfig(critic.model, 0, args.dtype), layout)


def resident(name: str) -> int:
    """Bytes: `VmRSS`, what the process takes now, or `VmHWM`, the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def now_and_peak(device: torch.device) -> tuple[int, int]:
    """Bytes in use, and the most since the last call, which sets the mark back."""
    if device.type == "cuda":
        found = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found
    found = resident("VmRSS"), resident("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")
    return found


def measure(args: argparse.Namespace, folder: Path, layout: str) -> dict[str, object]:
    """One layout in this process: held and peak bytes, seconds of each iteration, a checksum."""
    distributed = init_distributed()
    device = distributed.device
    tokenizer = load_hf_tokenizer(str(folder / "actor"))
    before, _ = now_and_peak(device)
    set_random_seed(SEED)
    roles = DeepSpeedRLHFEngine.load(role_setup(args, folder, layout), tokenizer, distributed)
    held, _ = now_and_peak(device)
    config = PPOConfig(
        SamplingConfig(max_answer_seq_len=args.answer_tokens),
        per_device_generation_batch_size=args.batch,
        per_device_training_batch_size=args.batch,
    )
    engine = None
    if args.engine == "static":
        engine = StaticRollout(StaticModel(roles.actor.module), tokenizer, args.batch)
    trainer = DeepSpeedPPOTrainer(roles, config, distributed.world_size, engine, seed=SEED)
    set_random_seed(SEED)
    ids = torch.randint(3, len(tokenizer), (args.batch, args.prompt_tokens))
    prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones(args.batch) > 0)
    seconds, cpu_seconds, rewards = [], [], []
    for _ in range(args.iterations):
        start, cpu_start = time.perf_counter(), time.process_time()
        rewards.append(trainer.train_rlhf(trainer.rollout([prompts]))["reward"])
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    _, peak = now_and_peak(device)
    return {
        "held": held - before,
        "peak": peak - before,
        "seconds": seconds[1:] or seconds,
        "cpu_seconds": cpu_seconds[1:] or cpu_seconds,
        "rewards": rewards,
    }


def in_own_process(words: list[str], folder: Path, layout: str) -> dict[str, object]:
    """`measure` in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.ppo_memory", *words]
    command += ["--folder", str(folder), "--layout", layout]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{layout}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace, words: list[str]) -> None:
    """Print a line for each layout."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_folders(args, folder)
        print(
            f"{size / 1e6:.0f} M parameters, {args.dtype}, LoRA r = {args.lora_dim}, batch "
            f"{args.batch}, {args.prompt_tokens} + {args.answer_tokens} tokens, {args.device}: "
            f"weights are {size * torch_dtype(args.dtype).itemsize / MIB:.0f} MiB\n"
        )
        found: dict[str, list[dict]] = {layout: [] for layout in LAYOUTS}
        for _ in range(args.turns):
            for layout, runs in found.items():
                runs.append(in_own_process(words, folder, layout))
    print("| layout | held MiB | peak MiB | of four | s an iteration | CPU s | first reward |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    four = statistics.median(run["peak"] for run in found["none"])
    for layout, runs in found.items():
        held, peak = (statistics.median(run[k] for run in runs) for k in ("held", "peak"))
        took, cpu = (
            statistics.median(s for run in runs for s in run[k]) for k in ("seconds", "cpu_seconds")
        )
        print(
            f"| {LAYOUTS[layout]} | {held / MIB:.0f} | {peak / MIB:.0f} | {peak / four:.2f} "
            f"| {took:.2f} | {cpu:.2f} | {runs[0]['rewards'][0]:.4f} |"
        )


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("--hidden", type=int, default=1024, help="width of the model")
    add("--layers", type=int, default=6, help="its layers")
    add("--vocabulary", type=int, default=8192, help="its tokens")
    add("--lora_dim", type=int, default=16, help="r of the adapters")
    add("--batch", type=int, default=2, help="prompts of a rollout")
    add("--prompt_tokens", type=int, default=32, help="of each prompt")
    add("--answer_tokens", type=int, default=16, help="of the longest answer")
    add("--gradient_checkpointing", action="store_true", help="recompute activations")
    add("--iterations", type=int, default=4, help="of PPO; the first warms up")
    add("--turns", type=int, default=2, help="processes of each layout")
    add("--dtype", default="bf16", choices=["fp32", "bf16"], help="of the weights")
    add("--engine", default="generate", choices=["generate", "static"], help="of the rollouts")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="where")
    add("--table", action="store_true", help="print model states of known models instead")
    add("--zero_stage", type=int, default=0, choices=[0, 1, 2, 3], help="of the table")
    add("--ranks", type=int, default=1, help="of the table")
    add("--gpu_gib", type=float, default=48.0, help="of the table: a GPU's memory")
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--layout", choices=[*LAYOUTS], help=argparse.SUPPRESS)
    return flags


def main() -> None:
    """Measure, or print the table."""
    args = parser().parse_args()
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if args.table:
        lora = LoraConfig(lora_dim=args.lora_dim)
        options = Options(args.dtype, args.zero_stage, args.ranks, lora)
        print("\n".join(table(options, args.gpu_gib)))
    elif args.layout is not None:
        print(json.dumps(measure(args, args.folder, args.layout)))
    else:
        compare(args, sys.argv[1:])


if __name__ == "__main__":
    main()
