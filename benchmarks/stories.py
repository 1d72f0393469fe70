"""PPO, RLOO and GRPO on a story model, judged by a rule that neither reward model nor trainer sees.

    python -m benchmarks.stories --model ./stories260K --data ./stories --output ./output

MODEL is a folder with a small story model. DATA holds train.jsonl and test.jsonl (prompt, chosen,
rejected), in which the happier of two continuations is chosen. For each seed, steps 1 and 2 run
once, then step 3 once for every arm, through the real programs. Then each policy writes
continuations of the held-out prompts, and the rule counts words:

- mood: happy words minus sad words of a continuation; the policy should raise it;
- nats: mean -log p of a sampled token under the model that step 3 started from. Text that runs
  away from language makes it rise; sampling the likely makes it fall.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from dschat.data.collators import PromptCollator
from dschat.functional.returns import answer_mask_from
from dschat.models.causal_lm import create_hf_model
from dschat.quickstart.report import held_out_prompts
from dschat.text.encoding import decode
from dschat.text.tokenizer import load_hf_tokenizer

HAPPY = frozenset(
    re.findall(
        "[a-z]+",
        "happy happily smile smiled smiling laugh laughed laughing fun love loved loves joy proud "
        "nice kind hug hugged hugs friend friends beautiful good great yummy excited thank thanked "
        "best",
    )
)
SAD = frozenset(
    re.findall(
        "[a-z]+",
        "sad sadly cry cried crying scared scary afraid angry mad hurt hurts upset worried lost "
        "broke broken bad fell pain ouch mean no not",
    )
)
ANSWER, PROMPT = 48, 64
TRAINING = Path(__file__).resolve().parents[1] / "training"
COMMON = {
    "actor_learning_rate": "2e-4",
    "critic_learning_rate": "3e-4",
    "per_device_training_batch_size": "32",
    "max_prompt_seq_len": str(PROMPT),
    "max_answer_seq_len": str(ANSWER),
    "num_warmup_steps": "0",
    "num_train_epochs": "100",
    "kl_coef": "0.05",
}
# All arms sample 128 answers an iteration.
PPO = {"per_device_generation_batch_size": "128", "critic_lora_dim": "16"}
GROUPS = {"per_device_generation_batch_size": "32", "answers_per_prompt": "4"}
ARMS = {
    "ppo, 1 epoch": PPO | {"ppo_epochs": "1"},
    "ppo, 4 epochs": PPO | {"ppo_epochs": "4"},
    "rloo": GROUPS | {"advantage_estimator": "rloo"},
    "grpo": GROUPS | {"advantage_estimator": "grpo"},
}


def mood(text: str) -> int:
    """Happy words minus sad words."""
    words = re.findall("[a-z]+", text.lower())
    return sum((word in HAPPY) - (word in SAD) for word in words)


STEPS = {
    "1": "step1_supervised_finetuning",
    "2": "step2_reward_model_finetuning",
    "dpo": "step2_dpo_finetuning",
    "3": "step3_rlhf_finetuning",
}


def run(step: str, folder: Path, flags: dict[str, str], switches: tuple[str, ...] = ()) -> float:
    """One step into a new folder, its log beside it; seconds."""
    program = TRAINING / STEPS[step] / "main.py"
    command = [sys.executable, str(program), "--output_dir", str(folder)]
    command += [part for name, value in flags.items() for part in (f"--{name}", *value.split(" "))]
    start = time.perf_counter()
    with folder.with_suffix(".log").open("w") as log:
        code = subprocess.run([*command, *switches], stdout=log, stderr=log, check=False).returncode
    if code:
        raise SystemExit(f"step {step} failed, see {folder.with_suffix('.log')}")
    return time.perf_counter() - start


@torch.no_grad()
def judge(folder: Path, reference: Path, data: Path, draws: int, seed: int) -> tuple[float, float]:
    """Mood and nats of continuations that a policy samples at temperature 1."""
    tokenizer = load_hf_tokenizer(str(folder))
    policy, first = (create_hf_model(str(f), tokenizer, torch.float32) for f in (folder, reference))
    prompts = held_out_prompts(data) * draws
    rows = [{"prompt_ids": tokenizer(prompt).input_ids[-PROMPT:]} for prompt in prompts]
    batch = PromptCollator(tokenizer.pad_token_id)(rows)
    torch.manual_seed(seed)
    moods, nats, tokens = [], 0.0, 0
    for ids, mask in zip(batch.input_ids.split(256), batch.attention_mask.split(256), strict=True):
        sequences = policy.generate(
            input_ids=ids, attention_mask=mask.long(), max_new_tokens=ANSWER, do_sample=True,
            top_k=0, top_p=1.0, temperature=1.0, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answers = sequences[:, ids.shape[1] :]
        answer_mask = answer_mask_from(answers, tokenizer.eos_token_id)
        moods += [
            mood(decode(tokenizer, row[keep].tolist(), skip_special_tokens=True))
            for row, keep in zip(answers, answer_mask, strict=True)
        ]
        seen = torch.cat([mask, answer_mask], dim=1).long()
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        logits = first(input_ids=sequences, attention_mask=seen, position_ids=positions).logits
        width = answers.shape[1]
        logprobs = logits[:, -width - 1 : -1].log_softmax(-1)
        taken = logprobs.gather(-1, answers.unsqueeze(-1)).squeeze(-1)
        nats -= taken[answer_mask].sum().item()
        tokens += int(answer_mask.sum())
    return statistics.mean(moods), nats / tokens


def curve(folder: Path, name: str) -> list[float]:
    """A figure of every iteration."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record[name] for record in records if record["kind"] == "train" and name in record]


def supervised(args: argparse.Namespace, seed: int) -> tuple[Path, dict[str, str], dict[str, str]]:
    """Step 1; its seed's folder, the flags of every step, and those of steps 1 and 2."""
    out = args.output / f"seed-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "data").exists() or (out / "data").symlink_to(args.data.resolve())
    shared = {
        "data_path": str(args.data), "data_output_path": str(args.output / "cache"),
        "data_split": "2,6,2", "prompt_format": "raw", "seed": str(seed), "dtype": args.dtype,
    }  # fmt: skip
    small = {"max_seq_len": str(PROMPT + ANSWER), "per_device_train_batch_size": "32"}
    if not (out / "sft" / "config.json").is_file():
        flags = {"model_name_or_path": str(args.model), "learning_rate": "5e-4"}
        run("1", out / "sft", shared | small | flags)
    return out, shared, small


def one_seed(args: argparse.Namespace, seed: int) -> dict[str, tuple[float, float]]:
    """Steps 1 and 2, then every arm; mood and nats by name."""
    out, shared, small = supervised(args, seed)
    sft, reward = out / "sft", out / "reward"
    if not (reward / "config.json").is_file():
        flags = {"model_name_or_path": str(sft), "learning_rate": "1e-3", "num_train_epochs": "3"}
        run("2", reward, shared | small | flags | {"per_device_train_batch_size": "16"})
    accuracy = curve_end(reward, "accuracy")
    found = {"sft": judge(sft, sft, out, args.draws, seed)}
    print(
        f"seed {seed}: reward model's accuracy {accuracy:.3f}; {told(*found['sft'])} after step 1"
    )
    for arm in args.arms:
        folder = out / re.sub("[^a-z0-9]+", "-", arm)
        models = {"actor_model_name_or_path": str(sft), "critic_model_name_or_path": str(reward)}
        steps = {"max_steps": str(args.iterations), "actor_lora_dim": "16"}
        if not (folder / "actor").is_dir():
            seconds = run("3", folder, shared | COMMON | models | steps | ARMS[arm] | args.more)
            print(f"  {arm}: {seconds / args.iterations:.1f} s an iteration", flush=True)
        found[arm] = judge(folder / "actor", sft, out, args.draws, seed)
        rewards = " ".join(f"{r:.2f}" for r in curve(folder, "reward"))
        print(f"  {arm}: {told(*found[arm])}; reward {rewards}", flush=True)
    return found


def curve_end(folder: Path, name: str) -> float:
    """A figure of the last evaluation."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if '"eval"' in line][-1][name]


def told(mean_mood: float, nats: float) -> str:
    """Both figures."""
    return f"mood {mean_mood:.2f}, {nats:.3f} nats/token"


def main() -> None:
    """Every seed, then a table of the arms."""
    parser = options(__doc__)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--iterations", type=int, default=14)
    args = parsed(parser)
    found = {seed: one_seed(args, seed) for seed in args.seeds}
    table(found, args.arms)


def options(description: str | None) -> argparse.ArgumentParser:
    """Flags of every comparison on the stories."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--draws", type=int, default=4, help="continuations of each prompt")
    parser.add_argument("--dtype", default="auto")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; flags that it does not know go to the programs, as `more`."""
    args, more = parser.parse_known_args()
    args.more = {name.removeprefix("--"): v for name, v in zip(more[::2], more[1::2], strict=True)}
    return args


def table(found: dict[int, dict[str, tuple[float, float]]], arms: list[str]) -> None:
    """Print every arm's figures by seed, and their means."""
    print("\narm: mood and nats/token above step 1's, by seed")
    for arm in ("sft", *arms):
        pairs = [(f[arm][0], f[arm][1] - f["sft"][1]) for f in found.values()]
        cells = "; ".join(f"{m:.2f} {nats:+.3f}" for m, nats in pairs)
        means = " ".join(f"{statistics.mean(column):+.2f}" for column in zip(*pairs, strict=True))
        print(f"{arm:<14} {cells}; means {means}")


if __name__ == "__main__":
    main()
