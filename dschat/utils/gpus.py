"""GPUs by name: memory, peak speed, bandwidth of memory and links.

Peaks are dense, in TFLOPS; where a document prints the figure with sparsity alone, its half. bf16
and fp16 accumulate in fp32, fp32 is without TF32. Volta and Turing have no bf16 units. Bandwidths
are in GB/s; a link's is that of one direction, half of what is printed for NVLink, between GPUs of
one machine. Memory is what a program sees (`torch.cuda.mem_get_info`), less than the figure in the
product's name; the range is that of PyTorch's out-of-memory errors in public reports.

| document, by NVIDIA | bf16, TFLOPS | memory | seen, GiB | link, both ways |
| --- | --- | --- | --- | --- |
| Blackwell data sheet, GB200 | 5,000 sparse | 186 GB, 8 TB/s | 184.31 | 1.8 TB/s |
| the same, HGX B200 | 4,500 sparse | 180 GB, 7.7 TB/s | 178.35 | 1.8 TB/s |
| nvidia.com/en-us/data-center/h200 | 1,979 sparse | 141 GB, 4.8 TB/s | 139.80 | 900 GB/s |
| nvidia.com/en-us/data-center/h100 | 1,979 sparse | 80 GB, 3.35 TB/s | 79.18-79.19 | 900 GB/s |
| A100 data sheet, SXM | 312 | 80 GB, 2,039 GB/s | 79.14-79.25 | 600 GB/s |
| the same | 312 | 40 GB, 1,555 GB/s | 39.42-39.49 | 600 GB/s |
| RTX A6000 data sheet | 309.7 sparse | 48 GB, 768 GB/s | 47.40-47.54 | PCIe 4, 64 GB/s |
| Ada white paper, RTX 4090 | 165.2 | 24 GB, 1,008 GB/s | 23.51-23.65 | PCIe 4, 64 GB/s |
| L40S data sheet | 362.05 | 48 GB, 864 GB/s | 44.39 | PCIe 4, 64 GB/s |

The figures were compared with texts that quote these documents, not with NVIDIA's own files: of
each product at least two, such as listings of resellers, glennklockwood.com/garden/processors on
A100, H100 and B200, and tables of peaks in other libraries; that of Lightning-AI/pytorch-lightning
(`fabric/utilities/throughput.py`) has the FP32 rate for bf16 on the 4090 and the A6000. Early texts
on the B200 say 8 TB/s. Two A6000 may have a bridge of 112.5 GB/s, which is not counted on. PCIe and
NVL boards of H100 and H200 are slower than SXM, the ones above: 1,513 and 1,671 sparse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dschat.errors import UserError
from dschat.settings import unknown

NVLINK_3, NVLINK_4, NVLINK_5 = 300.0, 450.0, 900.0
PCIE_4 = 32.0


@dataclass(frozen=True)
class Gpu:
    """One product.

    Attributes:
        pattern: of the device name that CUDA gives it.
        bf16, fp16, fp32: peaks in TFLOPS; None where it has no units, or no figure is published.
        name: by which a plan asks for it; None where the rest is not in the table.
        memory: GiB. bandwidth: of the memory, GB/s. link: to a neighbour, GB/s.
    """

    pattern: str
    bf16: float | None
    fp16: float
    fp32: float | None
    name: str | None = None
    memory: float = 0.0
    bandwidth: float = 0.0
    link: float = PCIE_4


# The first match wins, so the slower boards of a chip stand before it.
GPUS = (
    Gpu(r"\bGB200\b", 2500, 2500, 80, "gb200", 184.3, 8000, NVLINK_5),
    Gpu(r"\bB200\b", 2250, 2250, 75, "b200", 178.3, 7700, NVLINK_5),
    Gpu(r"\bH[12]00 NVL\b", 835.5, 835.5, 60),
    Gpu(r"\bG?H200\b", 989.5, 989.5, 67, "h200", 139.8, 4800, NVLINK_4),
    Gpu(r"\bH100 PCIe\b", 756.5, 756.5, 51),
    Gpu(r"\bH100\b", 989.5, 989.5, 67, "h100", 79.2, 3350, NVLINK_4),
    Gpu(r"\bA100.*\b40GB\b", 312, 312, 19.5, "a100-40", 39.4, 1555, NVLINK_3),
    Gpu(r"\bA100\b", 312, 312, 19.5, "a100-80", 79.2, 2039, NVLINK_3),
    Gpu(r"\bRTX A6000\b", 154.8, 154.8, 38.7, "a6000", 47.4, 768, PCIE_4),
    Gpu(r"\bA40\b", 149.7, 149.7, 37.4),
    Gpu(r"\bA10\b", 125, 125, 31.2),
    Gpu(r"\bRTX 4090$", 165.2, 165.2, 82.6, "4090", 23.5, 1008, PCIE_4),
    Gpu(r"\bL40S\b", 362, 362, 91.6, "l40s", 44.4, 864, PCIE_4),
    Gpu(r"\bL4\b", 121, 121, 30.3),
    Gpu(r"\bV100S\b", None, 130, 16.4),
    Gpu(r"\bV100-PCIE\b", None, 112, 14),
    Gpu(r"\bV100\b", None, 125, 15.7),
    Gpu(r"\bT4\b", None, 65, 8.1),
)
BY_NAME = {gpu.name: gpu for gpu in GPUS if gpu.name is not None}


def gpu_of_device(device_name: str | None) -> Gpu | None:
    """Look a device up by the name that CUDA gives it; None where the table has none.

    A MIG slice has no entry: its name does not say how much of the GPU it is.
    """
    if device_name is None or re.search(r"\bMIG\b", device_name):
        return None
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, device_name)), None)


def named_gpu(name: str) -> Gpu:
    """Look a GPU up by its short name, such as a6000 or a100-80.

    Raises:
        UserError: an unknown one, with the nearest.
    """
    if name not in BY_NAME:
        reason = unknown("gpu", name, [*BY_NAME], "; known: " + ", ".join(BY_NAME))
        raise UserError(f"{reason}; for one that is not here give its like, and its memory")
    return BY_NAME[name]
