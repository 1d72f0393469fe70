"""NCCL through `init_distributed`, with one rank."""

import torch
import torch.distributed as dist

from dschat.utils.distributed import all_reduce_sum


def test_one_rank_reduces_on_its_gpu(device, distributed):
    assert (distributed.rank, distributed.world_size) == (0, 1)
    assert distributed.device.type == device.type
    assert dist.get_backend() == ("nccl" if device.type == "cuda" else "gloo")
    tensor = torch.tensor([1.5, -2.0], device=distributed.device)
    dist.all_reduce(tensor)
    assert tensor.tolist() == [1.5, -2.0]
    assert all_reduce_sum([1.5, -2.0]) == [1.5, -2.0]
