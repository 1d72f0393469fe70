"""Reward models of families without a classifier, and of models that pad with the end token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dschat.models.reward_model import create_critic_model, scores_at_end
from tests.helpers import tiny
from tests.helpers.families import save_family
from tests.helpers.rounding import LOGITS
from tests.helpers.steps import (
    PPO,
    REWARD,
    REWARD_EVALUATION,
    SFT,
    preference_rows,
    run_worker,
    write_rows,
)

COMMON = [
    "--data_path",
    "data.jsonl",
    "--data_output_path",
    "cache",
    "--data_split",
    "4,4,2",
    "--dtype",
    "fp32",
]
STEP = [*COMMON, "--max_seq_len", "64", "--learning_rate", "1e-3", "--max_steps", "3"]
STEP += ["--num_warmup_steps", "0"]
LORA = ["--lora_dim", "4", "--lora_module_name", "attn"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("granite", 1), ("olmoe", 2)])
def test_three_steps_of_a_family_without_a_classifier(tmp_path: Path, name: str, ranks: int):
    """Each next step reads what the one before wrote; ZeRO-3 where there are two ranks."""
    save_family(tmp_path / "model", name)
    write_rows(tmp_path / "data.jsonl", preference_rows(40, seed=0))
    stage = "3" if ranks > 1 else "0"
    zero = ["--zero_stage", stage]
    roles = ["--actor_model_name_or_path", "sft", "--critic_model_name_or_path", "reward"]
    ppo = [PPO, *roles, *COMMON, "--max_prompt_seq_len", 48, "--max_answer_seq_len", 8]
    ppo += ["--actor_zero_stage", stage, "--critic_zero_stage", stage, "--max_steps", 1]
    ppo += ["--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4]
    evaluate = [*COMMON, "--max_seq_len", "64"]
    plan = [
        [SFT, "--model_name_or_path", "model", *STEP, *zero, "--output_dir", "sft"],
        [REWARD, "--model_name_or_path", "sft", *STEP, *zero, *LORA, "--output_dir", "reward"],
        [*ppo, "--output_dir", "ppo"],
    ]
    for folder in ("reward", "reward/adapter", "ppo/critic"):
        plan.append([REWARD_EVALUATION, "--model_name_or_path", folder, *evaluate])
    results, printed = run_worker(plan, tmp_path, ranks=ranks)
    assert [result.code for result in results] == [0] * 6, [r.stderr[-2000:] for r in results]
    assert f"takes a {name} as it is; the folder will hold the trunk" in printed
    for folder in ("reward", "ppo/critic"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as tensors:
            assert "v_head.weight" in tensors.keys()  # noqa: SIM118 (not a mapping)
        assert (tmp_path / folder / "REWARD_MODEL.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_step_2_on_a_model_that_pads_with_its_end(tmp_path: Path, ranks: int):
    """transformers scores as we do; with two ranks under ZeRO-3."""
    folder = tiny.save_llama_folder(tmp_path / "model", pad_token_id=tiny.EOS)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(folder)
    rows = preference_rows(40, seed=0)
    write_rows(tmp_path / "data.jsonl", rows)
    argv = [REWARD, "--model_name_or_path", "model", *STEP, "--output_dir", "reward"]
    argv += ["--zero_stage", "3" if ranks > 1 else "0"]
    results, printed = run_worker([argv], tmp_path, ranks=ranks)
    assert results[0].code == 0, results[0].stderr[-3000:]
    assert "</s> ends answers and is the padding" in printed
    out = str(tmp_path / "reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(out)
    reader = AutoTokenizer.from_pretrained(out)
    texts = [row["prompt"] + row["chosen"] + "</s>" for row in rows[:6]]
    batch = reader(texts, padding=True, return_tensors="pt")
    ours = create_critic_model(out, reader, torch.float32).eval()
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = scores_at_end(ours(batch["input_ids"], mask), mask)
        torch.testing.assert_close(theirs(**batch).logits[:, 0], expected, rtol=0, atol=LOGITS)
        for text, score in zip(texts, expected, strict=True):
            alone = theirs(**reader([text], return_tensors="pt")).logits[0, 0]
            torch.testing.assert_close(alone, score, rtol=0, atol=LOGITS)
