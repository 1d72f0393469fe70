"""Throughput figures against numbers worked by hand."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dschat.utils.flops import Matrices, peak_tflops
from dschat.utils.perf import (
    Gpus,
    RolloutWork,
    Step3Times,
    TrainingWork,
    print_throughput,
    print_throughput_step3,
    step3_throughput,
    throughput,
)
from tests.helpers.rounding import FIGURE

# A layer of 4 matrices of 4 × 4 (attention) and 2 of 4 × 16 (MLP): 192 parameters. Head: 64.
OPT = SimpleNamespace(model_type="opt", num_hidden_layers=1, hidden_size=4, vocab_size=16)
MATRICES = Matrices(trunk=192, adapters=0, head=64, trained=256, attention=4)
A100X2 = Gpus(2, torch.bfloat16, "NVIDIA A100-SXM4-80GB")
WORK = TrainingWork(OPT, MATRICES, tokens=12, samples=2)  # mean length 6: 21 causal pairs each


def test_training_throughput_by_hand():
    speed = throughput(WORK, 0.5, A100X2)
    assert (speed.tokens_per_s, speed.samples_per_s) == (24, 4)
    # Megatron: 24·3·12·1·16 = 13824, times 1 + 6/24 + 16/64 = 1.5: 20736; over 0.5 s · 2 GPUs
    assert speed.tflops_per_gpu == pytest.approx(20736e-12, rel=FIGURE, abs=0)
    # Exact: 2·192·12 + 4·4·42 + 2·64·12 = 6816 forward, three times that with backward
    assert speed.mfu == pytest.approx(20448e-12 / 312, rel=FIGURE, abs=0)


def test_checkpointing_moves_the_megatron_figure_but_not_mfu():
    plain = throughput(WORK, 0.5, A100X2)
    work = dataclasses.replace(WORK, gradient_checkpointing=True)
    again = throughput(work, 0.5, A100X2)
    assert again.mfu == plain.mfu
    assert again.tflops_per_gpu == pytest.approx(plain.tflops_per_gpu * 4 / 3, rel=FIGURE, abs=0)


def test_lora_lowers_the_megatron_factor_unless_the_base_trains():
    plain = throughput(WORK, 1.0, A100X2).tflops_per_gpu
    lora = throughput(dataclasses.replace(WORK, lora_dim=1), 1.0, A100X2).tflops_per_gpu
    assert lora == pytest.approx(plain * 2.5 / 3, rel=FIGURE, abs=0)  # k = 2·1/4
    both = dataclasses.replace(WORK, lora_dim=1, trains_base=True)
    assert throughput(both, 1.0, A100X2).tflops_per_gpu == plain


def test_share_of_an_unknown_peak_or_architecture_is_left_out(capsys):
    work = dataclasses.replace(WORK, matrices=None)
    assert " | MFU " in print_throughput(WORK, 0.5, A100X2)
    assert throughput(work, 0.5, A100X2).mfu is None
    for line in (
        print_throughput(work, 0.5, A100X2),
        print_throughput(WORK, 0.5, Gpus(1, torch.float32)),
    ):
        assert line.endswith(" Megatron TFLOPs/GPU")
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_line_is_printed_on_rank_0_only(capsys):
    line = print_throughput(WORK, 0.5, A100X2, rank=1)
    assert capsys.readouterr().out == ""
    assert print_throughput(WORK, 0.5, A100X2) == line
    assert capsys.readouterr().out == line + "\n"
    assert line.startswith("Latency 0.500 s | 24 tokens/s | 4.00 samples/s | ")


def test_duration_must_be_positive():
    with pytest.raises(ValueError, match="0 seconds"):
        throughput(WORK, 0, A100X2)


def step3(**changes):
    rollout = RolloutWork(prompt_tokens=8, new_tokens=4, samples=2, steps=2)
    matrices = dataclasses.replace(MATRICES, head=4, trained=196)
    critic = dataclasses.replace(WORK, matrices=matrices)
    times = Step3Times(generation=0.5, training=0.25, end_to_end=1.0)
    return WORK, critic, rollout, times, dataclasses.replace(A100X2, **changes)


def test_step3_throughput_by_hand():
    speed = step3_throughput(*step3())
    # Megatron: a forward over 2 sequences of 6 is 20736 / 3 = 6912; training is 20736 per role.
    assert speed.generation_tflops_per_gpu == pytest.approx(6912e-12, rel=FIGURE, abs=0)
    assert speed.training_tflops_per_gpu == pytest.approx(2 * 41472e-12, rel=FIGURE, abs=0)
    assert speed.tflops_per_gpu == pytest.approx((6912 + 41472) / 2 * 1e-12, rel=FIGURE, abs=0)
    # 256 matrix parameters of 2 bytes, read twice in half a second
    assert speed.weights_gb_per_s == pytest.approx(256 * 2 * 2 / 0.5 / 1e9, rel=FIGURE, abs=0)
    # Generation: 10 tokens through the layers (2·192·10), 2 · 15 pairs (16·30), head for 4 tokens
    # (2·64·4): 4832. Scoring: twice the actor's 6816 and twice the critic's 5280 + 2·4·12.
    # Training: three times each.
    exact = 4832 + 5 * 6816 + 5 * 5376
    assert speed.mfu == pytest.approx(exact / 2 * 1e-12 / 312, rel=FIGURE, abs=0)


def test_step3_throughput_without_a_critic():
    actor, _, *rest = step3()
    speed = step3_throughput(actor, None, *rest)
    assert speed.training_tflops_per_gpu == pytest.approx(41472e-12, rel=FIGURE, abs=0)
    # As above: generation, two passes of the actor's trunk to score, three to train.
    exact = 4832 + 5 * 6816
    assert speed.mfu == pytest.approx(exact / 2 * 1e-12 / 312, rel=FIGURE, abs=0)


def test_step3_throughput_of_an_actor_that_rests():
    """In the critic's warm-up: it scores and samples, and makes no pass to train."""
    actor, critic, *rest = step3()
    speed = step3_throughput(dataclasses.replace(actor, tokens=0, samples=0), critic, *rest)
    assert speed.training_tflops_per_gpu == pytest.approx(41472e-12, rel=FIGURE, abs=0)
    exact = 4832 + 2 * 6816 + 5 * 5376
    assert speed.mfu == pytest.approx(exact / 2 * 1e-12 / 312, rel=FIGURE, abs=0)


def test_bandwidth_follows_the_dtype():
    half = step3_throughput(*step3()).weights_gb_per_s
    full = step3_throughput(*step3(dtype=torch.float32)).weights_gb_per_s
    assert full == 2 * half


def test_bandwidth_of_a_mixture_is_not_known():
    actor, *rest = step3()
    matrices = dataclasses.replace(MATRICES, mixture=True)
    speed = step3_throughput(dataclasses.replace(actor, matrices=matrices), *rest)
    assert speed.weights_gb_per_s is None and speed.mfu is not None


def test_step3_line(capsys):
    line = print_throughput_step3(*step3(name=None), rank=0)
    assert capsys.readouterr().out == line + "\n"
    parts = line.split(" | ")
    assert [p.split()[0] for p in parts] == ["End-to-end", "Generation", "Training"]
    assert "End-to-end 1.000 s, 2.00 samples/s, " in line
    assert "4 tokens, 8 tokens/s, 250.00 ms/step" in line


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.5),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.5),
        ("NVIDIA H200", torch.float16, 989.5),
        ("NVIDIA H200 NVL", torch.float16, 835.5),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989.5),
        ("NVIDIA A100-PCIE-40GB", torch.float32, 19.5),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
        ("Tesla V100-SXM2-32GB", torch.bfloat16, None),
        ("Tesla T4", torch.float64, None),
        (None, torch.bfloat16, None),
    ],
)
def test_peak_by_device_name(name, dtype, peak):
    assert peak_tflops(name, dtype) == peak
