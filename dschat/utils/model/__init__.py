"""Tokenizers, causal language models, reward models."""
