"""Adapters: the layers, what is done to a model with them, and PEFT's files."""
