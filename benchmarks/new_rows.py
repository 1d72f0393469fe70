"""Compare starts of new vocabulary rows: how likely they are, and whether LoRA learns to write one.

    python -m benchmarks.new_rows --model ./stories260K
    python -m benchmarks.new_rows --model ./SmolLM2-135M-Instruct --steps 0

A token is added to the model's vocabulary, once for each spread around the mean of the other rows
(in units of theirs; `fresh` draws as a fresh model does). Figures for each:

- P(new): probability of all new rows together at a position of plain text before training, the mean
  over positions and the largest;
- P(end): after `--steps` steps of 16 questions with short answers that end in the new token, LoRA
  of rank 16 on every linear layer at `--learning_rate` (B at 16 times it), the probability of that
  token after a complete answer.
"""

from __future__ import annotations

import argparse
import random

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.end_token import NAMES, THINGS, row
from dschat.models import vocabulary
from dschat.models.logprobs import target_loss
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.utils.module.lora import convert_linear_layer_to_lora, only_optimize_lora_parameters
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.optim import build_optimizer, get_optimizer_grouped_parameters
from dschat.utils.optim_config import OptimizerConfig

SPREADS = ("fresh", "0", "0.1", "0.3", "0.6", "1")
PLAIN = (
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park "
    "with her dog. One day, they found a big red ball and they were very happy.",
    "The capital of France is Paris, which lies on the Seine. In 1889 the Eiffel Tower was built "
    "for a world fair; today some seven million people visit it each year.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
)


def grown(name: str, spread: str) -> tuple[PreTrainedModel, int]:
    """Load the model with one more token; its id is that of the first new row."""
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, trust_remote_code=False
    ).eval()
    rows = model.config.vocab_size
    if spread == "fresh":
        torch.manual_seed(vocabulary.NEW_ROWS_SEED)
        multiple = vocabulary.VOCABULARY_MULTIPLE
        model.resize_token_embeddings(rows + 1, pad_to_multiple_of=multiple, mean_resizing=False)
    else:
        vocabulary.NEW_ROWS_SPREAD = float(spread)
        vocabulary.grow_vocabulary(model, rows + 1)
    return model, rows


@torch.no_grad()
def likely(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, first: int
) -> tuple[float, float]:
    """Mean and largest probability of the rows from `first` on, at the positions of plain text."""
    found = []
    for text in PLAIN:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        found.append(model(input_ids=ids).logits[0].softmax(-1)[:, first:].sum(-1))
    together = torch.cat(found)
    return together.mean().item(), together.max().item()


def learnt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    end: int,
    steps: int,
    learning_rate: float,
) -> float:
    """Train adapters on answers that end in `end`; its mean probability after whole answers."""
    draw, questions = random.Random(0), []
    for _ in range(16 * steps):
        pair = row(draw.choice(NAMES.split()), draw.choice(THINGS.split()))
        prompt = tokenizer(pair["prompt"])["input_ids"]
        answer = tokenizer(pair["chosen"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([*prompt, *answer, end])
        questions.append((ids, torch.arange(len(ids)) >= len(prompt)))
    torch.manual_seed(0)
    convert_linear_layer_to_lora(model, LoraConfig(lora_dim=16))
    only_optimize_lora_parameters(model)
    config = OptimizerConfig(learning_rate=learning_rate, loraplus_lr_ratio=16.0)
    optimizer = build_optimizer(get_optimizer_grouped_parameters(model, config), config)
    for step in range(steps):
        rows, answers = zip(*questions[16 * step : 16 * step + 16], strict=True)
        ids, loss_mask = (pad_sequence(part, batch_first=True) for part in (rows, answers))
        loss = target_loss(model, {"input_ids": ids}, loss_mask)  # padding comes last
        (loss / loss_mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        asked = [model(input_ids=ids[None, :-1]).logits[0, -1] for ids, _ in questions[:40]]
    return torch.stack(asked).softmax(-1)[:, end].mean().item()


def main() -> None:
    """Print a line for each spread."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--spreads", nargs="+", default=SPREADS)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    args = parser.parse_args()
    tokenizer = load_hf_tokenizer(args.model)
    for spread in args.spreads:
        model, end = grown(args.model, spread)
        mean, largest = likely(model, tokenizer, end)
        line = f"{spread:>6}: P(new) mean {mean:.1e}, largest {largest:.4f}"
        if args.steps:
            learned = learnt(model, tokenizer, end, args.steps, args.learning_rate)
            line += f"; P(end) {learned:.3f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
