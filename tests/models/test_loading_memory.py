"""Ranks of a machine load one model without a copy each in the memory of the host."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.launch import run_ranks
from tests.helpers.tiny import SPECIAL, byte_tokenizer

WORKER = Path(__file__).with_name("loading_worker.py")
SIZE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 512}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_two_ranks_take_less_than_a_copy_each(tmp_path: Path, monkeypatch):
    """Below ZeRO-3 weights are pages of the file, which ranks share; at ZeRO-3 a rank's shard."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=8, **SIZE, **SPECIAL))
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(tmp_path / "model", max_shard_size="40MB")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    whole = sum(p.numel() for p in model.parameters()) * 2 / 2**20  # MiB
    # What is freed goes back to the system; how much glibc keeps instead differs from run to run.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    printed = run_ranks(WORKER, 2, [str(tmp_path / "model")], tmp_path)[0]
    (line,) = [line for line in printed.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    assert whole > 190
    assert max(found["0"]) < 0.3 * whole, found  # measured: 25 of 198 MiB
    assert max(found["3"]) < 0.7 * whole, found  # 111, of which 99 are the shard
