"""Closing table of the embedded default: effect of each step, judged on held-out prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dschat.data.batches import PromptBatch
from dschat.data.collators import PromptCollator
from dschat.functional.returns import answer_mask_from
from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import RewardModel, create_critic_model, scores_at_end
from dschat.quickstart.model import MAX_NEW_TOKENS
from dschat.quickstart.task import GoldScore, gold_score
from dschat.report.records import evaluations
from dschat.rlhf.generation import generate
from dschat.rlhf.part_config import SamplingConfig
from dschat.text.encoding import decode
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.utils.printable import aligned, cut, window

SHOWN_PROMPTS = 3
ANSWERS_PER_PROMPT = 5
MODELS = {"base": "model", "SFT": "actor-models", "PPO": "step3-models/actor"}


@dataclass(frozen=True)
class Judged:
    """Sampled answers of one model to the held-out prompts, and their scores."""

    answers: list[str]
    reward: float
    gold: GoldScore


def held_out_prompts(output_dir: Path) -> list[str]:
    """Read the prompts of the test file, each once, in its order."""
    lines = (output_dir / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(json.loads(line)["prompt"] for line in lines))


@torch.no_grad()
def judge(
    model_dir: Path, reward_model: RewardModel, prompts: list[str], device: torch.device, seed: int
) -> Judged:
    """Sample one answer per prompt at temperature 1 and score it by reward model and gold rule."""
    tokenizer = load_hf_tokenizer(str(model_dir))
    model: nn.Module = create_hf_model(str(model_dir), tokenizer, torch.float32)
    model.to(device).eval()
    rows = [{"prompt_ids": tokenizer(prompt).input_ids} for prompt in prompts]
    batch: PromptBatch = PromptCollator(tokenizer.pad_token_id)(rows).to(device)
    torch.manual_seed(seed)
    sequences = generate(model, batch, SamplingConfig(MAX_NEW_TOKENS), tokenizer).sequences
    ids = sequences[:, batch.input_ids.shape[1] :]
    mask = answer_mask_from(ids, tokenizer.eos_token_id)
    attention_mask = torch.cat([batch.attention_mask, mask], dim=1)
    scores = scores_at_end(reward_model(sequences, attention_mask), attention_mask)
    answers = [
        decode(tokenizer, row[keep].tolist(), skip_special_tokens=True)
        for row, keep in zip(ids, mask, strict=True)
    ]
    return Judged(answers, scores.mean().item(), gold_score(prompts, answers))


def print_report(output_dir: Path, seconds: dict[int, float], seed: int) -> None:
    """Judge base, SFT and PPO model on the held-out prompts; print the table and some answers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    questions = held_out_prompts(output_dir)
    prompts = questions * ANSWERS_PER_PROMPT
    reward_dir = str(output_dir / "reward-models")
    reward_model = create_critic_model(reward_dir, load_hf_tokenizer(reward_dir), torch.float32)
    reward_model.to(device).eval()
    judged = {
        name: judge(output_dir / folder, reward_model, prompts, device, seed)
        for name, folder in MODELS.items()
    }
    perplexity = [record["perplexity"] for record in evaluations(output_dir / "actor-models")]
    accuracy = evaluations(output_dir / "reward-models")[-1]["accuracy"]
    before, after = judged["SFT"], judged["PPO"]
    formed = before.gold.well_formed, after.gold.well_formed
    rows = [
        ("", "before", "after", "seconds"),
        ("step 1: perplexity", _two(perplexity[0]), _two(perplexity[-1]), f"{seconds[1]:.0f}"),
        ("step 2: reward-model accuracy", "", f"{accuracy:.3f}", f"{seconds[2]:.0f}"),
        ("step 3: reward", _two(before.reward), _two(after.reward), f"{seconds[3]:.0f}"),
        ("        gold success", f"{before.gold.gold:.3f}", f"{after.gold.gold:.3f}", ""),
        ("        well-formed", f"{formed[0]:.3f}", f"{formed[1]:.3f}", ""),
    ]
    print(
        f"\n{len(questions)} held-out prompts, {ANSWERS_PER_PROMPT} answers each at temperature 1"
    )
    print("\n".join(aligned(rows)))
    for i in range(min(SHOWN_PROMPTS, len(questions))):
        print(f"\n{prompts[i].strip()}")
        for name, model in judged.items():
            print(cut(f"  {name:>4}: {model.answers[i].strip()!r}", window()))
    print("\nwritten:")
    for folder in ("model", "data", "sft", "actor-models", "reward-models", "step3-models"):
        print(f"  {output_dir / folder}")
    print(f"chat with it: dschat chat {output_dir / MODELS['PPO']}")


def _two(value: float) -> str:
    return f"{value:,.2f}"
