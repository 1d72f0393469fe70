"""Tests on the first GPU: `make test-gpu`. Elsewhere they are skipped, all for one reason."""

import pytest
import torch

from dschat.utils.distributed import Distributed, init_distributed


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: run `make test-gpu` where there is one")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def distributed(device: torch.device) -> Distributed:
    """The process group of one rank, on NCCL."""
    return init_distributed()
