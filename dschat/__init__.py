"""Supervised fine-tuning, reward modelling and PPO with LoRA+, on the DeepSpeed engine."""

__version__ = "1.0.0.dev0"
