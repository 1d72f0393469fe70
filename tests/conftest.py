"""Settings and fixtures of all tests: one thread, no network, no GPU without --gpu, a seed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before the first import of torch and huggingface_hub, which read them. One thread: sums of floats
# depend on how many threads share them, and the ranks that tests start have one as well.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder must not wait for a network

import pytest
import torch

from tests.helpers.tiers import position

torch.set_num_threads(1)
LINEAR = torch.nn.functional.linear

# A shell that starts the tests in its background has them ignore SIGINT, and every process that
# they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu", action="store_true", help="let the tests see the GPUs; for tests/gpu alone"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Without --gpu everything is computed on the CPU, also where there is a GPU."""
    if not config.getoption("--gpu"):
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first; the order is otherwise as it was."""
    tests = Path(__file__).parent
    items.sort(key=lambda item: position(item.path.relative_to(tests).as_posix()))


@pytest.fixture(scope="module", autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """No file sees DeepSpeed's linear layer, which takes torch's place for good at ZeRO-3."""
    yield
    torch.nn.functional.linear = LINEAR


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Each test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


# Imported inside: transformers takes seconds, and not every test needs it.
@pytest.fixture
def tiny_tokenizer():
    """One token a byte; pad 0, bos 1 and eos 2 are distinct."""
    from tests.helpers import tiny

    return tiny.byte_tokenizer()


@pytest.fixture
def byte_tokenizer():
    """Byte-level BPE without BOS; `<eos>` is 0, `<pad>` is 1."""
    from tests.helpers import bpe

    return bpe.byte_tokenizer()


@pytest.fixture
def space_tokenizer():
    """BPE that puts `▁` before every text, with BOS; `<s>` is 1, `</s>` is 2 and also the pad."""
    from tests.helpers import bpe

    return bpe.space_tokenizer()
