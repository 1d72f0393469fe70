"""GRPO with a reward that checks: sums with their working, by a model that mostly slips.

    python -m benchmarks.arithmetic --output ./output --seeds 1 2 3 --arms grpo
    python -m benchmarks.arithmetic --output ./output --seeds 1

Writes rows of GSM8K's shape, "27 + 35?" and "7 + 5 = 12, 2 + 3 + 1 = 6 #### 62", and trains the
embedded default's model on answers most of which have a slip: a wrong sum of units, a carry that is
forgotten or made up, a result that is not what was worked out, a working that never comes to its
end. No pair of summands of a held-out sum is met in training. Then step 3 runs once for every arm,
through the real program, with `--reward_function exact_number`; each policy answers the held-out
sums, and what counts is the share of right ones. A finished step 1 is taken as it is, so that arms
may be run one after the other.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.stories import curve, run
from dschat.data.collators import PromptCollator
from dschat.models.causal_lm import create_hf_model
from dschat.quickstart.model import build_model, build_tokenizer
from dschat.rlhf.checks import exact_number
from dschat.rlhf.generation import generate
from dschat.rlhf.part_config import SamplingConfig
from dschat.text.conversations import question
from dschat.text.encoding import decode
from dschat.text.formats import choose_format
from dschat.text.tokenizer import load_hf_tokenizer

SUMMANDS, HELD_OUT, SFT_ROWS = 50, 200, 8000
ANSWER = 28  # tokens; a complete answer has up to 19
RIGHT = 0.17
SLIPS = {"units": 0.25, "carry": 0.3125, "result": 0.3125, "endless": 0.125}  # of the others
SFT = {
    "learning_rate": "2e-3",
    "per_device_train_batch_size": "64",
    "num_train_epochs": "6",
    "max_seq_len": "128",
    "eval_interval": "0",
}
GRPO = {
    "advantage_estimator": "grpo",
    "answers_per_prompt": "8",
    "per_device_generation_batch_size": "16",
    "per_device_training_batch_size": "64",
    "ppo_epochs": "2",
    "reward_function": "exact_number",
    "max_prompt_seq_len": "32",
    "max_answer_seq_len": str(ANSWER),
    "actor_learning_rate": "5e-4",
    "lr_scheduler_type": "constant",
    "num_warmup_steps": "0",
    "kl_coef": "0.01",
    "num_train_epochs": "20",
    "max_eval_samples": "8",
    "log_every": "1",
}
ARMS: dict[str, dict[str, str]] = {
    "grpo": {},
    "cliprange_high 0.28": {"cliprange_high": "0.28"},
    "loss_aggregation answer": {"loss_aggregation": "answer"},
    "loss_aggregation constant": {"loss_aggregation": "constant"},
    "advantage_std none": {"advantage_std": "none"},
    "mask_truncated_answers": {"mask_truncated_answers": ""},
    "importance_level sequence": {
        "importance_level": "sequence",
        "loss_aggregation": "answer",
        "cliprange": "3e-2",
    },
    "dynamic_sampling_rounds 2": {"dynamic_sampling_rounds": "2"},
}


def answer_of_kind(draw: random.Random, a: int, b: int, kind: str) -> str:
    """Work out a + b, with the slip of a kind; begins with a space, without an end token."""
    units, carry = a % 10 + b % 10, int(a % 10 + b % 10 >= 10)
    if kind == "units":
        units += draw.choice((-2, -1, 1, 2))
    if kind == "carry":
        carry = 1 - carry
    units, tens = max(units, 0), a // 10 + b // 10 + carry
    result = 10 * tens + units % 10
    if kind == "result":
        result += draw.choice((-20, -10, -3, -2, -1, 1, 2, 3, 10, 20))
    carried = " + 1" if carry else ""
    working = f" {a % 10} + {b % 10} = {units}, {a // 10} + {b // 10}{carried} = {tens}"
    return f"{working},{working}" if kind == "endless" else f"{working} #### {max(result, 0)}"


def write_inputs(folder: Path, seed: int, right: float = RIGHT) -> None:
    """Write `model/`, `sft/` with slips, and `data/` with the right answers, by a seed."""
    draw = random.Random(seed)
    pairs = [(a, b) for a in range(SUMMANDS) for b in range(SUMMANDS)]
    draw.shuffle(pairs)
    held_out, train = pairs[:HELD_OUT], pairs[HELD_OUT:]

    def rows(pairs: list[tuple[int, int]], kinds: list[str]) -> list[dict[str, str]]:
        return [
            {"question": f"{a} + {b}?", "answer": answer_of_kind(draw, a, b, kind)}
            for (a, b), kind in zip(pairs, kinds, strict=True)
        ]

    weights = [right, *((1 - right) * share for share in SLIPS.values())]
    slips = draw.choices(["right", *SLIPS], weights, k=SFT_ROWS)
    sets = {
        "sft/train": rows(draw.choices(train, k=SFT_ROWS), slips),
        "sft/test": rows(held_out, ["right"] * HELD_OUT),
        "data/train": rows(train, ["right"] * len(train)),
        "data/test": rows(held_out, ["right"] * HELD_OUT),
    }
    for name, content in sets.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    texts = [row[column] for row in sets["sft/train"] for column in ("question", "answer")]
    tokenizer = build_tokenizer([*texts, "\n\nHuman:", "\n\nAssistant:"])
    build_model(tokenizer, seed).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


@dataclass(frozen=True)
class Judged:
    """Shares of answers to the held-out sums: right ones, and those that ended; their length."""

    right: float
    ended: float
    length: float


@torch.no_grad()
def judge(model_dir: Path, data: Path, draws: int, seed: int) -> Judged:
    """Sample answers to the held-out sums at temperature 1."""
    tokenizer = load_hf_tokenizer(str(model_dir))
    model = create_hf_model(str(model_dir), tokenizer, torch.float32).eval()
    lines = (data / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines] * draws
    form = choose_format(tokenizer)
    ids = [tokenizer(form.prompt(question(row["question"]))).input_ids for row in rows]
    batch = PromptCollator(tokenizer.pad_token_id)([{"prompt_ids": row} for row in ids])
    torch.manual_seed(seed)
    sampling = SamplingConfig(max_answer_seq_len=ANSWER)
    found = generate(model, batch, sampling, tokenizer).sequences[:, batch.input_ids.shape[1] :]
    ended = (found == tokenizer.eos_token_id).any(-1)
    texts = [decode(tokenizer, row.tolist(), skip_special_tokens=True) for row in found]
    scores = exact_number(texts, texts, answer=[row["answer"] for row in rows])
    return Judged(
        statistics.mean(float(score or 0.0) for score in scores),
        ended.float().mean().item(),
        (found != tokenizer.pad_token_id).float().sum(-1).mean().item(),
    )


def cpu_minutes() -> float:
    """CPU time of finished programs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def of_seed(args: argparse.Namespace, seed: int) -> dict[str, list[float]]:
    """Step 1 once and step 3 for every arm; figures of each."""
    folder, draws = args.output / f"seed-{seed}", args.draws
    sft, data = folder / "sft-model", folder / "data"
    common = {"seed": str(seed), "dtype": "fp32", "data_output_path": str(folder / "cache")}
    paths = {"model_name_or_path": str(folder / "model"), "data_path": str(folder / "sft")}
    if not sft.is_dir():  # else it stands from an earlier call, for other arms
        write_inputs(folder, seed, args.right)
        run("1", sft, SFT | common | paths)
    before = judge(sft, data, draws, seed)
    print(f"seed {seed} | after step 1 | {before.right:.3f} right | {cpu_minutes():.1f} min CPU")
    figures = {}
    for name in args.arms:
        target, start = folder / name.replace(" ", "_"), cpu_minutes()
        paths = {"actor_model_name_or_path": str(sft), "data_path": str(data)}
        flags = GRPO | common | paths | ARMS[name] | {"max_steps": str(args.iterations)}
        switches = tuple(f"--{flag}" for flag, value in flags.items() if not value)
        run("3", target, {flag: value for flag, value in flags.items() if value}, switches)
        after = judge(target / "actor", data, draws, seed)
        rewards = curve(target, "reward")
        reached = next((i for i, r in enumerate(rewards, 1) if r > 0.8), len(rewards) + 1)
        figures[name] = [after.right, after.ended, after.length, float(reached)]
        figures[name] += [curve(target, "kl")[-1], cpu_minutes() - start]
        shown = " | ".join(f"{x:.3f}" for x in figures[name])
        print(f"seed {seed} | {name} | {shown}", flush=True)
    return figures


def main() -> None:
    """Print a table: a line for each arm, means over the seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--iterations", type=int, default=44)
    parser.add_argument("--right", type=float, default=RIGHT, help="share of right rows in step 1")
    parser.add_argument("--draws", type=int, default=5, help="answers to each held-out sum")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [of_seed(args, seed) for seed in args.seeds]
    print("arm | right | ended | tokens | iterations to a reward of 0.8 | KL | CPU min")
    for name in args.arms:
        columns = zip(*(figures[name] for figures in found), strict=True)
        print(" | ".join([name, *(f"{statistics.mean(column):.3f}" for column in columns)]))


if __name__ == "__main__":
    main()
