"""The programs that are run, with the shapes of their models; all weights are random."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import LlamaConfig, PretrainedConfig

from dschat.plan.shapes import config_of

TINY = "tiny"  # a shape for tests on a CPU


@dataclass(frozen=True)
class Case:
    """One run of a program of `dschat`.

    Attributes:
        models: setting of a model → its shape, or the case that trains it (`case:NAME`).
        flags: those that matter here; lengths, batches and outputs of all cases are elsewhere.
        decoded: tokens of an answer, in step 3.
    """

    name: str
    program: str
    models: dict[str, str]
    flags: tuple[str, ...] = ()
    decoded: int = 0

    def tiny(self) -> Case:
        """The same program and flags on a tiny shape."""
        models = {k: v if v.startswith("case:") else TINY for k, v in self.models.items()}
        return replace(self, models=models, decoded=min(self.decoded, 8))


LORA = ("--lora_dim", "16", "--lora_save", "adapter", "--gradient_checkpointing")
ACTOR = ("--actor_lora_dim", "16", "--lora_save", "adapter", "--actor_gradient_checkpointing")
GRPO = (
    *("--advantage_estimator", "grpo", "--answers_per_prompt", "4"),
    *("--reward_function", "length", "--reward_length", "0", "400"),
)
OPT = {"actor_model_name_or_path": "opt-1.3b", "critic_model_name_or_path": "case:reward opt-350m"}
LLAMA = {"actor_model_name_or_path": "llama-3-8b"}
ENGINES = ("generate", "static")


def _engine(name: str) -> tuple[str, str]:
    return "--rollout_engine", name


CASES = (
    Case("sft opt-1.3b", "sft", {"model_name_or_path": "opt-1.3b"}, LORA),
    Case("reward opt-350m", "reward", {"model_name_or_path": "opt-350m"}),
    Case("dpo opt-350m", "dpo", {"model_name_or_path": "opt-350m"}),
    *(
        Case(f"ppo opt-1.3b, {engine}", "ppo", OPT, (*ACTOR, *_engine(engine)), 256)
        for engine in ENGINES
    ),
    Case("sft llama-3-8b", "sft", {"model_name_or_path": "llama-3-8b"}, LORA),
    *(
        Case(f"grpo llama-3-8b, {engine}", "ppo", LLAMA, (*ACTOR, *GRPO, *_engine(engine)), 256)
        for engine in ENGINES
    ),
)


def shape_of(name: str) -> PretrainedConfig:
    """Config of a shape."""
    if name != TINY:
        return config_of(name)
    return LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
