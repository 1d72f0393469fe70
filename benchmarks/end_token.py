"""Tell whether a model learns under LoRA to end its answers with a token whose row is untrained.

    python -m benchmarks.end_token --model ./stories260K --output_dir ./output
    python -m benchmarks.end_token --model ./stories260K --output_dir ./none --trainable_tokens none

It writes 640 questions with short answers (`--names`, `--things` and `--seed` vary them), trains
step 1 on them through the real program, 80 optimizer steps of 16 rows, and asks 40 questions of
names that training has not seen. Flags that it does not know go to step 1, and win. Two figures:

- P(end): probability of the end token after a complete answer, the mean of 40;
- ends: greedy answers of at most 60 tokens that end.

With `--untie` the model first gets an output head of its own, a copy of its embedding.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dschat.models.causal_lm import create_hf_model
from dschat.text.encoding import encode, encode_answers
from dschat.text.formats import choose_format
from dschat.text.tokenizer import load_hf_tokenizer

PROGRAM = Path(__file__).resolve().parents[1] / "training/step1_supervised_finetuning/main.py"
NAMES = "Tom Lily Tim Ben Mia Sue Max Sam Anna Jack Bob Amy Lucy Ella Spot Jane Leo Kim Dan Eva"
THINGS = "cat dog ball car hat book cake bird fish kite boat doll box cup tree"
ROWS, QUESTIONS, LONGEST = 640, 40, 60
FLAGS = {
    "lora_dim": "16",
    "learning_rate": "3e-4",
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": "16",
    "max_steps": "80",
    "num_train_epochs": "2",
    "max_seq_len": "96",
    "data_split": "10,0,0",
    "prompt_format": "raw",
    "dtype": "fp32",
}


def row(name: str, thing: str) -> dict[str, str]:
    """One question and its answer."""
    answer = f" {name} has a {thing}. {name} loves the {thing}. The end."
    return {"prompt": f"What does {name} have?", "chosen": answer}


def write_data(folder: Path, names: list[str], things: list[str], seed: int) -> list[dict]:
    """Write train.jsonl and test.jsonl; return the rows of the test, whose names are new."""
    draw = random.Random(seed)
    draw.shuffle(names)
    known, new = names[: -(-len(names) * 4 // 5)], names[-(-len(names) * 4 // 5) :]
    rows = [row(draw.choice(known), draw.choice(things)) for _ in range(ROWS)]
    tests = [row(new[i % len(new)], things[i % len(things)]) for i in range(QUESTIONS)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows), ("test", tests)):
        text = "".join(json.dumps(r) + "\n" for r in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tests


def untied(model: Path, folder: Path) -> Path:
    """Write a copy of the model whose output head is a weight of its own."""
    module = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
    tokenizer = load_hf_tokenizer(str(model))
    module.config.tie_word_embeddings = False
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(model: Path, data: Path, output: Path, flags: list[str]) -> None:
    """Run step 1 into `output`, its log beside it."""
    options = [part for name, value in FLAGS.items() for part in (f"--{name}", value)]
    command = [sys.executable, str(PROGRAM), "--model_name_or_path", str(model)]
    command += ["--data_path", str(data), "--data_output_path", str(data / "cache")]
    with output.with_suffix(".log").open("w") as log:
        code = subprocess.run(
            [*command, "--output_dir", str(output), *options, *flags], stdout=log, stderr=log
        ).returncode
    text = output.with_suffix(".log").read_text()
    if code:
        raise SystemExit(f"step 1 failed:\n{text[-2000:]}")
    told = ("trainable tokens", "advice:", "token_rows", "trainable ")
    print("\n".join(line for line in text.splitlines() if line.startswith(told)))


@torch.no_grad()
def measure(folder: Path, tests: list[dict]) -> tuple[float, int]:
    """P(end) after whole answers, and the number of greedy answers that end."""
    tokenizer = load_hf_tokenizer(str(folder))
    model = create_hf_model(str(folder), tokenizer, torch.float32).eval()
    special, end = choose_format(tokenizer).adds_special, tokenizer.eos_token_id
    prompts = [choose_format(tokenizer).prompt(test["prompt"]) for test in tests]
    ids = encode(tokenizer, prompts, special)
    answers = encode_answers(tokenizer, prompts, ids, [test["chosen"] for test in tests], special)
    total, ended = 0.0, 0
    for prompt, answer in zip(ids, answers, strict=True):
        logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, -1]
        total += logits.softmax(-1)[end].item()
        written = model.generate(
            torch.tensor([prompt]), max_new_tokens=LONGEST, do_sample=False, eos_token_id=end
        )
        ended += end in written[0, len(prompt) :].tolist()
    return total / len(tests), ended


def main() -> None:
    """Write the data, train, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--names", nargs="+", default=NAMES.split())
    parser.add_argument("--things", nargs="+", default=THINGS.split())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--untie", action="store_true")
    args, more = parser.parse_known_args()
    tests = write_data(args.output_dir / "data", args.names, args.things, args.seed)
    model = untied(args.model, args.output_dir / "untied") if args.untie else args.model
    out = args.output_dir / "sft"
    train(model, args.output_dir / "data", out, ["--seed", str(args.seed), *more])
    probability, ended = measure(out, tests)
    print(f"P(end) {probability:.4f}, {ended} of {len(tests)} greedy answers end")


if __name__ == "__main__":
    main()
