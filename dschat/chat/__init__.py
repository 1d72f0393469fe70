"""Conversation with a model folder: prompts that fit, answers that stream."""
