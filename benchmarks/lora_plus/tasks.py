"""Tasks of the LoRA+ grid: a model and the answers it learns.

`embedded` needs nothing but this repository: the quickstart's model learns its world with all
weights, once, and is then adapted to the same facts in another language, a cipher of words written
backwards. `hh` adapts any model folder to the chosen answers of a preference set.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.lora_plus.training import Row, Run, Task, fit
from dschat.data.batches import SFTBatch
from dschat.data.collators import SFTCollator
from dschat.data.config import DataConfig
from dschat.data.datasets import create_prompt_dataset
from dschat.models.causal_lm import check_context, create_hf_model
from dschat.quickstart import world
from dschat.quickstart.model import build_model, build_tokenizer, corpus
from dschat.quickstart.task import sft_rows, split_prompts
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.utils.optim_config import OptimizerConfig

EVAL_BATCH = 32
WORLD_SEED = 1
TRAIN_ROWS, TEST_ROWS = 8000, 128
PRETRAIN_RATE, PRETRAIN_STEPS, PRETRAIN_BATCH = 3e-3, 600, 16


def embedded_task(work: Path, max_seq_len: int) -> Task:
    """The quickstart's model, pretrained on its world (cached in `work`), to learn the cipher."""
    tokenizer = build_tokenizer(corpus())
    rng = random.Random(WORLD_SEED)
    train, held_out = split_prompts(rng)
    plain = [sft_rows(rng, train, TRAIN_ROWS), sft_rows(rng, held_out, TEST_ROWS)]
    cipher = cipher_of(WORLD_SEED)
    secret = [[encipher(row, cipher) for row in rows] for rows in plain]
    source = _written(work / "source", plain, tokenizer, max_seq_len, work)
    target = _written(work / "target", secret, tokenizer, max_seq_len, work)
    collator = SFTCollator(tokenizer.pad_token_id)
    folder = work / "pretrained"
    if not folder.is_dir():
        model = build_model(tokenizer, WORLD_SEED)
        config = OptimizerConfig(PRETRAIN_RATE)
        fit(
            Task("source", model, source[0], _batches(source[1], collator), collator),
            model,
            config,
            Run("full", PRETRAIN_RATE, PRETRAIN_RATE, WORLD_SEED, PRETRAIN_STEPS),
            PRETRAIN_BATCH,
        )
        # Renamed when whole, so that an interrupted write is not taken for a model.
        part = work / "pretrained.part"
        shutil.rmtree(part, ignore_errors=True)
        tokenizer.save_pretrained(part)
        model.save_pretrained(part)
        part.rename(folder)
    model = create_hf_model(str(folder), tokenizer, torch.float32)
    return _task("embedded", model, target, collator)


def file_task(name: str, model_name: str, data_path: str, max_seq_len: int, work: Path) -> Task:
    """A model folder, to learn the chosen answers of `data_path`; raises UserError on bad input."""
    tokenizer = load_hf_tokenizer(model_name)
    check_context(model_name, max_seq_len, "max_seq_len")
    rows = tokenised(data_path, tokenizer, max_seq_len, work)
    model = create_hf_model(model_name, tokenizer, torch.float32)
    return _task(name, model, rows, SFTCollator(tokenizer.pad_token_id))


def _task(
    name: str, model: PreTrainedModel, rows: tuple[list[Row], list[Row]], collator: SFTCollator
) -> Task:
    return Task(name, model, rows[0], _batches(rows[1], collator), collator)


def cipher_of(seed: int) -> dict[str, str]:
    """Every word of the world's answers, each for another: a permutation with one cycle."""
    rng = random.Random(seed)
    phrases = [p for ends in (world.OPENERS, world.CLOSERS) for ps in ends.values() for p in ps]
    truths = [sentence for fact in world.all_facts() for sentence in fact.statements()]
    texts = [*phrases, *world.EVASIONS, *truths]
    words = sorted({word.strip(".,!") for text in texts for word in text.split()})
    rng.shuffle(words)
    return dict(zip(words, [*words[1:], words[0]], strict=True))


def encipher(row: dict[str, str], cipher: dict[str, str]) -> dict[str, str]:
    """The row with its answer's words exchanged and put backwards; the question stays as it is."""
    words = [word.strip(".,!") for word in row["response"].split()]
    answer = "".join(f" {cipher[word]}" for word in reversed(words))
    return {"prompt": row["prompt"], "response": answer}


def _written(
    folder: Path,
    splits: Sequence[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    work: Path,
) -> tuple[list[Row], list[Row]]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), splits, strict=True):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return tokenised(str(folder), tokenizer, max_seq_len, work)


def tokenised(
    data_path: str,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    work: Path,
    phase: int = 1,
) -> tuple[list[Row], list[Row]]:
    """Rows to train on and to evaluate on, at most TEST_ROWS; of phase 2 three fifths, and all."""
    config = DataConfig(
        data_path=(data_path,),
        data_split="1" if phase == 1 else "2,6,2",
        data_output_path=str(work / "tokens"),
        max_eval_samples=TEST_ROWS if phase == 1 else None,
    )
    data = create_prompt_dataset(config, tokenizer, phase, seed=WORLD_SEED, max_seq_len=max_seq_len)
    return list(data.train), list(data.eval)


def _batches(rows: list[Row], collator: SFTCollator) -> list[SFTBatch]:
    rows = sorted(rows, key=lambda row: row["length"])
    return [collator(rows[i : i + EVAL_BATCH]) for i in range(0, len(rows), EVAL_BATCH)]
