"""What engines of two ranks hold and receive is what the plan says of each, kind by kind."""

import pytest

from benchmarks.plan_on_ranks import Cell, count

CELLS = [
    Cell("llama", lora_dim=8, stage=0, dtype="bf16", accumulation=2),
    Cell("opt", lora_dim=0, stage=1, dtype="fp32", accumulation=2),
    Cell("gemma3", lora_dim=8, stage=2, dtype="bf16", accumulation=2),
    Cell("qwen3", lora_dim=0, stage=3, dtype="bf16", accumulation=2),
    Cell("llama", lora_dim=8, stage=3, dtype="bf16", accumulation=1),
]


@pytest.mark.slow
def test_two_ranks_hold_and_receive_what_is_planned():
    for row in count(CELLS, ranks=2):
        least = 0.001 * sum(row["held"].values())  # what DeepSpeed keeps beside: counters, norms
        for kind, planned in row["held, planned"].items():
            assert row["held"][kind] == pytest.approx(planned, rel=0.05, abs=least), (row, kind)
        assert row["counted"] == pytest.approx(row["planned"], rel=0.05), row
