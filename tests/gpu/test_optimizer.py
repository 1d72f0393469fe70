"""The fused AdamW on a GPU against the CPU's."""

import torch
from torch import nn

from dschat.utils.optim import build_optimizer, get_optimizer_grouped_parameters
from dschat.utils.optim_config import OptimizerConfig
from tests.helpers.rounding import ROUNDING, weight_rtol
from tests.helpers.tiny import adapted, tiny_llama

STEPS = 5
CONFIG = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)


def after_steps(device: torch.device | str) -> tuple[list[str], list[nn.Parameter]]:
    """Names and values of adapters after steps with the same drawn gradients on any device."""
    module = adapted(tiny_llama()).to(device)
    optimizer = build_optimizer(get_optimizer_grouped_parameters(module, CONFIG), CONFIG)
    assert optimizer.defaults["fused"]
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    draw = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        for parameter in trained.values():
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(device)
        optimizer.step()
    return list(trained), [p.detach().cpu() for p in trained.values()]


def test_fused_adamw_equals_the_cpus_within_rounding(device):
    (names, on_gpu), (_, on_cpu) = after_steps(device), after_steps("cpu")
    for name, one, other in zip(names, on_gpu, on_cpu, strict=True):
        rate = CONFIG.rate("lora_B" if name.endswith("lora_B") else "lora_A")
        # A step moves by at most about twice its rate, in a quotient of about 16 operations.
        atol = STEPS * 2 * rate * 16 * ROUNDING
        torch.testing.assert_close(
            one, other, atol=atol, rtol=weight_rtol(STEPS), msg=lambda m, n=name: f"{n}: {m}"
        )
