"""Adapted experts against PEFT's `ParamWrapper`: time of forward and backward, and what is kept.

    python -m benchmarks.lora_experts
    python -m benchmarks.lora_experts --device cuda --width 2048 --experts 64 --tokens 4096

Both hold the same weights of one Mixtral block and see the same input, by the implementations of
experts in `transformers` that suit training. They take turns; times are medians. Kept is what
autograd holds between the two passes.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.lora_layer import kept_bytes, seconds, turn
from dschat.utils.module.lora import convert_linear_layer_to_lora
from dschat.utils.module.lora_config import LoraConfig

WEIGHTS = ("experts.gate_up_proj", "experts.down_proj")


def blocks(args: argparse.Namespace, config: MixtralConfig) -> tuple[nn.Module, nn.Module]:
    """Ours and PEFT's adapters on one block."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"block": MixtralSparseMoeBlock(config)}).requires_grad_(False)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.02)
    base.to(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    lora = LoraConfig(lora_dim=args.rank, lora_module_name=("experts",))
    ours = convert_linear_layer_to_lora(copy.deepcopy(base), lora)["block"]
    targets = {"target_modules": [], "target_parameters": list(WEIGHTS)}
    theirs = PeftConfig(r=args.rank, lora_alpha=args.rank, **targets)
    return ours, inject_adapter_in_model(theirs, base)["block"]


def main() -> None:
    """Compare at the sizes given, print a row for each implementation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    config = MixtralConfig(
        hidden_size=args.width, intermediate_size=args.inner, num_local_experts=args.experts
    )
    pair = blocks(args, config)
    dtype = next(pair[0].parameters()).dtype
    x = torch.randn(1, args.tokens, args.width, device=args.device, dtype=dtype)
    grad = torch.randn_like(x)
    x.requires_grad_(True)
    print("implementation  ours ms  PEFT ms  ours kept MiB  PEFT kept MiB")
    for way in ("eager", "grouped_mm"):
        config._experts_implementation = way
        for layer in pair:
            for module in layer.modules():
                if hasattr(module, "has_gate"):
                    module.config = config
        times: list[list[float]] = [[], []]
        for repeat in range(1 + args.repeats):
            for i in (0, 1) if repeat % 2 else (1, 0):
                times[i].append(seconds(lambda b=pair[i]: turn(b, x, grad), args.device))
        medians = [f"{1e3 * statistics.median(t[1:]):.0f}" for t in times]
        kept = [f"{kept_bytes(layer, x) / 2**20:.1f}" for layer in pair]
        print(f"{way:14}  {medians[0]:>7}  {medians[1]:>7}  {kept[0]:>13}  {kept[1]:>13}")


if __name__ == "__main__":
    main()
