"""Causal language models and reward models: load, pack, save."""
