"""Plans for `resume_worker.py`: the steps as they are killed and resumed, and their launch."""

from __future__ import annotations

import json
import shlex
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from dschat.models.reward_model import RewardModel
from dschat.models.reward_statistics import RewardStatistics, write_statistics
from dschat.models.save import save_hf_format
from dschat.train.checkpoint_folder import END, checkpoints_in, folder_of
from tests.helpers.adapters import ALONE
from tests.helpers.launch import run_ranks
from tests.helpers.steps import PPO, REWARD, SFT, free_port, write_inputs, write_rows
from tests.helpers.tiny import byte_tokenizer, tiny_llama

WORKER = Path(__file__).with_name("resume_worker.py")
DATA = shlex.split("--data_path data --data_split 4,4,2 --data_output_path cache")
# 27 rows, 4 a step: 7 steps in each of 2 epochs, the last one short. Dropout draws at every step,
# and saves (every 3) lie between lines of the log (every 2).
TRAINING = "--max_seq_len 64 --log_every 2 --num_train_epochs 2 --num_warmup_steps 2 --dropout 0.1"
BATCHES = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 1e-3"
LORA = shlex.split("--lora_dim 4 --lora_dropout 0.3")
MODEL = ["--model_name_or_path", "model", *DATA, *shlex.split(TRAINING), *shlex.split(BATCHES)]
SFT_LORA = [SFT, *MODEL, *LORA, "--dtype", "fp32"]
REWARD_FULL = [REWARD, *MODEL, "--dtype", "bf16", "--zero_stage", "2"]
PPO_COMMON = [
    *(PPO, "--actor_model_name_or_path", "model", "--critic_model_name_or_path", "critic", *DATA),
    *shlex.split(
        "--max_prompt_seq_len 48 --max_answer_seq_len 4 --num_warmup_steps 0 --enable_ema"
    ),
    *shlex.split("--actor_learning_rate 1e-3 --critic_learning_rate 1e-3"),
    *shlex.split("--per_device_generation_batch_size 2 --per_device_training_batch_size 2"),
    *shlex.split("--answers_per_prompt 2 --generation_chunk_size 3"),
    *shlex.split("--max_eval_samples 4 --actor_lora_dim 4 --print_answers"),
    *shlex.split("--reward_function own_rewards:length --reward_scaling saved"),
    *shlex.split("--unsupervised_dataset_name texts.jsonl --unsup_coef 0.3"),
]
# Every knob of GRPO at once, judged by columns; letters and digits end answers, some are cut.
GRPO_KNOBS = [
    *(PPO, "--actor_model_name_or_path", "model", *DATA, "--dtype", "fp32"),
    *shlex.split("--max_prompt_seq_len 48 --max_answer_seq_len 4 --num_warmup_steps 0"),
    *shlex.split("--actor_learning_rate 1e-3 --advantage_estimator grpo --answers_per_prompt 2"),
    *shlex.split("--rollout_engine generate"),  # by its draws some answers are cut, and some end
    *shlex.split("--per_device_generation_batch_size 2 --per_device_training_batch_size 4"),
    *shlex.split("--generation_batches 2 --gradient_accumulation_steps 2 --ppo_epochs 2"),
    *shlex.split("--max_eval_samples 4 --actor_lora_dim 4 --cliprange_high 0.3"),
    *shlex.split("--loss_aggregation constant --advantage_std none --mask_truncated_answers"),
    *shlex.split("--importance_level sequence --dynamic_sampling_rounds 2"),
    *shlex.split("--reward_function batch_rewards:odd length --reward_function_weight 1 0"),
    *("--reward_length", "0", "3", "--stop_strings", *string.ascii_letters, *string.digits),
]
BATCH_REWARDS = """
def odd(prompts, answers, chosen, rejected):
    assert all(" " in text for text in chosen + rejected)
    return [None if text.endswith("a") else len(text) % 2 for text in answers]
"""
# What depends on the clock.
TIMES = ("seconds", "samples_per_s", "tokens_per_s", "tflops", "answer_tokens_per_s")


@dataclass(frozen=True)
class Run:
    """One start of a program: what kills it, what a shell does before it.

    A signal is its name, the rank that gets it, and the lines of metrics that come before it.
    """

    argv: Sequence[str]
    kill: tuple[str, str] | None = None
    shell: str | None = None
    signal: tuple[str, int, int] | None = None


@dataclass(frozen=True)
class Outcome:
    """Result of a run on one rank; a negative code is the signal that ended it."""

    code: int
    stdout: str
    stderr: str
    read: list[str]  # model folders whose weights were read

    @property
    def error(self) -> str:
        """The line in which it refused; nothing was loaded before."""
        assert self.code == 2 and self.read == [], self.stderr[-3000:]
        (line,) = (x for x in self.stderr.splitlines() if x.startswith("error: "))
        return line


def while_saving(step: int) -> tuple[str, str]:
    """A kill when the first file of a checkpoint has been written."""
    return "torch.save", f"*/.step-{step:06d}.tmp/*"


def interrupted(argv: Sequence[str], name: str, save_steps: int, killed: int) -> dict[str, Run]:
    """A run that never stops and never saves; one that is killed in a save; the rest of that."""
    saving = [*argv, "--save_steps", str(save_steps), "--output_dir", f"{name}-killed"]
    return {
        f"{name} complete": Run([*argv, "--output_dir", f"{name}-complete"]),
        f"{name} killed": Run(saving, while_saving(killed)),
        f"{name} resumed": Run([*saving, "--resume"]),
    }


def stopped(argv: Sequence[str], name: str, signal: tuple[str, int, int]) -> dict[str, Run]:
    """A run that never stops; one that a signal stops, which saves nothing else; the rest of it."""
    there = [*argv, "--output_dir", f"{name}-stopped"]
    return {
        f"{name} complete": Run([*argv, "--output_dir", f"{name}-complete"]),
        f"{name} stopped": Run(there, signal=signal),
        f"{name} resumed": Run([*there, "--resume"]),
    }


def write_models(folder: Path) -> None:
    """Data, a language model, a reward model and its statistics, a reward function, plain text."""
    write_inputs(folder)
    torch.manual_seed(1)
    reward = RewardModel(tiny_llama(1, max_position_embeddings=128).base_model)
    save_hf_format(reward, byte_tokenizer(), folder / "critic", ALONE)
    write_statistics(RewardStatistics(0.2, 1.5, 26, "rows"), folder / "critic")
    (folder / "own_rewards.py").write_text("def length(prompt, answer): return len(answer) / 4\n")
    (folder / "batch_rewards.py").write_text(BATCH_REWARDS)
    texts = [{"text": f"{a} and {b} make {a + b}. "} for a in range(9) for b in range(9)]
    write_rows(folder / "texts.jsonl", texts)


def launch_runs(runs: dict[str, Run], folder: Path, ranks: int) -> dict[str, Outcome]:
    """Run them in turn in `folder`; return rank 0's outcomes by name."""
    logs = folder / "logs"
    logs.mkdir()
    run_ranks(WORKER, ranks, [write_plan(runs, folder, ranks)], log_dir=logs)
    return read_outcomes(runs, folder)


def write_plan(runs: dict[str, Run], folder: Path, ranks: int) -> str:
    """Write what WORKER takes as its argument, which it runs in that folder."""
    # A run of one rank needs no port, which another process might have by the time it starts.
    ports = [free_port() if ranks > 1 else "none" for _ in runs]
    plan = [{**vars(run), "port": port} for run, port in zip(runs.values(), ports, strict=True)]
    (folder / "plan.json").write_text(json.dumps(plan))
    return str(folder / "plan.json")


def read_outcomes(runs: dict[str, Run], folder: Path, rank: int = 0) -> dict[str, Outcome]:
    """Read what came of a plan's runs on one rank."""
    results = json.loads((folder / f"results.{rank}.json").read_text())
    return {name: Outcome(**r) for name, r in zip(runs, results, strict=True)}


def figures(folder: Path) -> list[dict[str, object]]:
    """Every line of the metrics without what depends on the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def assert_same_end(one: Path, other: Path) -> None:
    """`assert_same_run`, and the other, once stopped, noted at its checkpoint that it ended.

    A pipeline would take one without the note for stopped over an older model.
    """
    assert max(checkpoints_in(folder_of(other)).items())[1].joinpath(END).is_file()
    assert_same_run(one, other)


def assert_same_run(one: Path, other: Path) -> None:
    """The same figures, and the same bits in every saved weight."""
    assert figures(one) == figures(other)
    files = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
    assert files
    for file in files:
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), file
