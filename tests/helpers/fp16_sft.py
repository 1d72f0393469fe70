"""Step 1 on a CPU that is told to train in fp16: slowly, and as the engine does it elsewhere.

DeepSpeed and the library refuse it by default, since no CPU is made for it.
"""

from __future__ import annotations

import runpy

from deepspeed.accelerator import get_accelerator

from dschat.train import run_context
from tests.helpers.steps import ROOT, SFT

if __name__ == "__main__":
    accelerator = type(get_accelerator())
    supported, resolve = accelerator.is_fp16_supported, run_context.resolve_dtype
    accelerator.is_fp16_supported = lambda self: True
    run_context.resolve_dtype = lambda name: name
    try:
        runpy.run_path(str(ROOT / SFT), run_name="__main__")
    finally:
        accelerator.is_fp16_supported, run_context.resolve_dtype = supported, resolve
