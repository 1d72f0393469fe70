"""Cost of padding in training: the same rows through one small model, batched in four ways.

Part of `benchmarks.data`, which makes the rows. The ways take turns, so that whatever else the
machine does hits all of them; figures are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dschat.data.batches import SFTBatch
from dschat.data.batching import BatchSampler, RowBatches, build_loader
from dschat.data.collators import PackedCollator, SFTCollator
from dschat.data.token_batches import PackedBatches, TokenBudgetBatches
from dschat.train.evaluation import answer_loss

SEED, TURNS = 1234, 3
ROWS, BATCH = 96, 4
VOCABULARY = 1024  # of the model: larger ids are folded, its speed is the same


def samplers(batch: int, max_len: int) -> dict[str, BatchSampler]:
    """Our three ways to make batches of about the same number of slots."""
    return {
        "length groups": RowBatches(batch),
        "by tokens": TokenBudgetBatches(batch * max_len),
        "packed": PackedBatches(batch, max_len),
    }


def batches(
    rows: datasets.Dataset, sampler: BatchSampler, pad_token_id: int, rank: int, ranks: int
) -> Iterable[SFTBatch]:
    """One epoch of this rank."""
    collator = PackedCollator if isinstance(sampler, PackedBatches) else SFTCollator
    place = {"rank": rank, "world_size": ranks, "seed": SEED, "shuffle": True}
    return build_loader(rows, collator(pad_token_id), sampler, **place)


def print_training_speed(rows: datasets.Dataset, max_len: int, pad_token_id: int) -> None:
    """Real tokens a second of forward, backward and update, each way over the same rows."""
    chosen = rows.shuffle(SEED).select(range(min(ROWS, len(rows))))
    ways = {"padded": RowBatches(BATCH), **samplers(BATCH, max_len)}
    epochs = {n: list(batches(chosen, g, pad_token_id, 0, 1)) for n, g in ways.items()}
    epochs["padded"] = [_widened(batch, max_len) for batch in epochs["padded"]]
    torch.manual_seed(SEED)
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    _train(model, optimizer, epochs["packed"][:1])
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, epoch in epochs.items():
            start = time.perf_counter()
            _train(model, optimizer, epoch)
            tokens = sum(int(batch.attention_mask.sum()) for batch in epoch)
            speeds[name].append(tokens / (time.perf_counter() - start))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\ntraining a Llama of {parameters:,} weights on {len(chosen)} rows, real tokens/s")
    padded = statistics.median(speeds["padded"])
    for name, found in speeds.items():
        speed = statistics.median(found)
        print(f"{name:<14} {speed:8,.0f}  {speed / padded:.2f} x padded")


def _widened(batch: SFTBatch, width: int) -> SFTBatch:
    missing = (0, width - batch.input_ids.shape[1])
    ids, attention_mask, loss_mask = (
        torch.nn.functional.pad(tensor, missing)
        for tensor in (batch.input_ids, batch.attention_mask, batch.loss_mask)
    )
    return SFTBatch(ids, attention_mask, batch.real, loss_mask)


def _train(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, epoch: list[SFTBatch]
) -> None:
    for batch in epoch:
        batch.input_ids.remainder_(VOCABULARY)
        optimizer.zero_grad()
        (answer_loss(model, batch) / batch.loss_mask.sum()).backward()
        optimizer.step()
