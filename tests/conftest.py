"""Shared by all tests: this folder becomes importable, so `launch` and `tiny` are."""

import os

import pytest

# Read when huggingface_hub is first imported: a name that is no folder must not wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def tiny_tokenizer():
    """One token a byte; pad 0, bos 1 and eos 2 are distinct."""
    from tests.helpers.tiny import (
        byte_tokenizer,  # here: tests without a model need not wait for it
    )

    return byte_tokenizer()
