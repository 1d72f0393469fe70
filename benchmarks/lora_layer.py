"""One adapted layer against PEFT's `lora.Linear`: time and memory of forward and backward.

    python -m benchmarks.lora_layer
    python -m benchmarks.lora_layer --device cuda --features 4096 --tokens 4096

Both layers hold the same weights and see the same input. They take turns, so that whatever else the
machine does hits both; times are medians, and the ratio is the median of the turns' ratios. Peak
memory is what a forward and backward pass allocates beyond the layer and its input, seen by
PyTorch's own profiler (on a GPU, by its allocator); kept is what autograd holds between the two.
PEFT is what `pip install -e .[dev]` brings; nothing else of this project needs it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import nn

from dschat.utils.module.lora import convert_linear_layer_to_lora
from dschat.utils.module.lora_config import LoraConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIONS = {"plain": {}, "dropout": {"lora_dropout": 0.05}, "DoRA": {"use_dora": True}}


def layers(
    features: int, rank: int, dtype: torch.dtype, device: str, options: dict
) -> tuple[nn.Module, nn.Module]:
    """Ours and PEFT's adapter on the same frozen layer, with equal values."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": nn.Linear(features, features)}).to(device, dtype)
    twin = nn.ModuleDict({"layer": nn.Linear(features, features)}).to(device, dtype)
    twin.load_state_dict(base.state_dict())
    ours = convert_linear_layer_to_lora(base, LoraConfig(lora_dim=rank, **options))["layer"]
    dropout = options.get("lora_dropout", 0.0)
    dora = options.get("use_dora", False)
    config = PeftConfig(
        r=rank, lora_alpha=rank, lora_dropout=dropout, use_dora=dora, target_modules=["layer"]
    )
    theirs = inject_adapter_in_model(config, twin, low_cpu_mem_usage=False)["layer"].to(dtype)
    with torch.no_grad():
        nn.init.normal_(ours.lora_B, std=0.02)
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
    return ours.train(), theirs.train()


def turn(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
    """One forward and backward pass."""
    layer(x).backward(grad)
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None


def seconds(work: Callable[[], None], device: str) -> float:
    """Seconds of one call, with the device's queue empty before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], None], device: str) -> int:
    """The most that one call holds beyond what it found."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def kept_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd holds for the backward pass, beside parameters and the input itself."""
    own = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), x)}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(kept.values())


def compare(args: argparse.Namespace, dtype: str, rank: int, kind: str) -> list[str]:
    """One row of the table."""
    pair = layers(args.features, rank, DTYPES[dtype], args.device, OPTIONS[kind])
    like = {"device": args.device, "dtype": DTYPES[dtype]}
    x = torch.randn(args.tokens, args.features, **like).requires_grad_(True)
    grad = torch.randn(args.tokens, args.features, **like)
    torch.manual_seed(0)
    tolerance = 1e-4 if dtype == "fp32" else 0.1
    with torch.no_grad():
        for layer in pair:
            layer.eval()
        torch.testing.assert_close(pair[0](x), pair[1](x), rtol=tolerance, atol=tolerance)
        for layer in pair:
            layer.train()
    times: list[list[float]] = [[], []]
    for repeat in range(args.warm_up + args.repeats):
        for i in (0, 1) if repeat % 2 else (1, 0):
            took = seconds(lambda layer=pair[i]: turn(layer, x, grad), args.device)
            if repeat >= args.warm_up:
                times[i].append(took)
    peaks = [peak_bytes(lambda layer=layer: turn(layer, x, grad), args.device) for layer in pair]
    kept = [kept_bytes(layer, x) for layer in pair]
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    milliseconds = [f"{1e3 * statistics.median(t):.2f}" for t in times]
    mebibytes = [f"{b / 2**20:.2f}" for b in (*peaks, *kept)]
    return [
        dtype,
        str(rank),
        kind,
        *milliseconds,
        f"{ratio:.2f}",
        *mebibytes[:2],
        f"{peaks[0] / peaks[1]:.2f}",
        *mebibytes[2:],
    ]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--features", type=int, default=2048, help="in = out")
    add("--tokens", type=int, default=512, help="rows of a batch")
    add("--ranks", type=int, nargs="+", default=[8, 128], help="r of the adapters")
    add("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), help="of all tensors")
    add("--kinds", nargs="+", default=list(OPTIONS), choices=list(OPTIONS), help="of adapters")
    add("--repeats", type=int, default=50, help="turns that count")
    add("--warm_up", type=int, default=5, help="turns before them")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="where")
    args = parser.parse_args()
    where = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"in = out = {args.features}, {args.tokens} tokens, forward and backward, {where}\n")
    head = [
        "dtype",
        "r",
        "kind",
        "ms",
        "PEFT",
        "ratio",
        "peak MiB",
        "PEFT",
        "ratio",
        "kept MiB",
        "PEFT",
    ]
    print("| " + " | ".join(head) + " |")
    print("| " + " | ".join("---" for _ in head) + " |")
    for dtype in args.dtypes:
        for rank in args.ranks:
            for kind in args.kinds:
                print("| " + " | ".join(compare(args, dtype, rank, kind)) + " |", flush=True)


if __name__ == "__main__":
    main()
