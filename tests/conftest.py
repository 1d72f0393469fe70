"""Shared by all tests: this folder becomes importable, so `launch` and `tiny` are."""

import pytest


@pytest.fixture
def tiny_tokenizer():
    """One token a byte; pad 0, bos 1 and eos 2 are distinct."""
    from tiny import byte_tokenizer  # here: tests without a model need not wait for it

    return byte_tokenizer()
