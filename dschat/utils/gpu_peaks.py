"""Peak speed of GPUs by name, the denominator of MFU."""

import re

import torch

# Dense peaks in TFLOPS as (pattern of the device name, bf16, fp16, fp32), from NVIDIA's data sheets
# of each product; where a sheet prints the sparse figure, its half. fp32 is without TF32. First
# match wins, so the slower boards of a chip stand before it. Volta and Turing have no bf16 units.
_PEAKS: tuple[tuple[str, float | None, float, float | None], ...] = (
    (r"\bG?B200\b", 2250, 2250, None),
    (r"\bH200 NVL\b", 835.5, 835.5, 60),
    (r"\bG?H200\b", 989.5, 989.5, 67),
    (r"\bH100 NVL\b", 835.5, 835.5, 60),
    (r"\bH100 PCIe\b", 756.5, 756.5, 51),
    (r"\bH100\b", 989.5, 989.5, 67),
    (r"\bA100\b", 312, 312, 19.5),
    (r"\bA40\b", 149.7, 149.7, 37.4),
    (r"\bA10\b", 125, 125, 31.2),
    (r"\bL40S\b", 362, 362, 91.6),
    (r"\bL4\b", 121, 121, 30.3),
    (r"\bV100S\b", None, 130, 16.4),
    (r"\bV100-PCIE\b", None, 112, 14),
    (r"\bV100\b", None, 125, 15.7),
    (r"\bT4\b", None, 65, 8.1),
)


def peak_tflops(device_name: str | None, dtype: torch.dtype) -> float | None:
    """Return a GPU's dense peak in TFLOPS for bf16, fp16 or fp32, or None where none is known.

    A MIG slice has no figure: its name does not say how much of the GPU it is.
    """
    column = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}.get(dtype)
    if device_name is None or column is None or re.search(r"\bMIG\b", device_name):
        return None
    rows = (row for row in _PEAKS if re.search(row[0], device_name))
    row = next(rows, None)
    return None if row is None else row[column]
