"""Flags that suit a step's rows and models better than those that it was given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import datasets
import numpy as np

from dschat.config.rlhf import RLHFSettings
from dschat.config.steps import RewardSettings
from dschat.errors import UserError
from dschat.models.config import Build, load_config, on_meta
from dschat.train.adapter_ranks import adapted_shapes, fitting_dim
from dschat.train.model_config import ModelConfig
from dschat.train.run_context import RunContext
from dschat.train.run_length import FEW_STEPS, RunLength

# Optimizer steps that a critic takes to fit its values at the scripts' rates, and how much faster a
# short run lets it learn at most: as fast as step 2 taught the same trunk (docs/ppo/update.md).
STEPS_OF_A_CRITIC, MOST_HASTE = 360, 10

# Optimizer steps in which a reward model's scores part (docs/reward_models.md), and passes over the
# same rows that are worth about as much as new ones: Muennighoff et al. 2023, arXiv:2305.16264.
STEPS_OF_A_REWARD_MODEL, MOST_EPOCHS = 60, 4

# Answers of an evaluation: a difference of two then has a standard error of an eighth of the
# rewards' spread.
ANSWERS_TO_JUDGE = 128
MULTIPLE = 8  # of tokens, of an answer's limit


def fitting_model(
    model: ModelConfig,
    name: str,
    build: Build,
    prefix: str,
    widths: Mapping[str, int],
    power: float = 1.0,
) -> tuple[ModelConfig, dict[str, int | float]]:
    """Fit adapters and rates to the model: its layers may be smaller, or larger, than foreseen."""
    factor = width_factor(name, widths[prefix]) ** power if prefix in widths else 1.0
    flags = {f"{prefix}{key}": rate for key, rate in scaled_rates(model, factor).items()}
    if model.lora.lora_dim:
        shapes = adapted_shapes(on_meta(name, build), model.lora)
        if (fitting := fitting_dim(shapes, model.lora.lora_dim)) < model.lora.lora_dim:
            model = replace(model, lora=replace(model.lora, lora_dim=fitting))
            flags[f"{prefix}lora_dim"] = fitting
    return model, flags


def width_factor(name: str, meant_for: int) -> float:
    """Width that rates are meant for over the model's; 1 for a family without one."""
    width = getattr(load_config(name).get_text_config(), "hidden_size", None)
    return meant_for / width if width else 1.0


def scaled_rates(model: ModelConfig, factor: float) -> dict[str, float]:
    """Learning rates for a model of another width: Adam's best falls about as one over it.

    Yang et al. 2022 (muP, arXiv:2203.03466), for hidden weights; to two digits.
    """
    if factor == 1:
        return {}
    rates, own = model.optimizer, model.optimizer.lora_learning_rate is not None
    scaled = {"learning_rate": rates.base_rate}
    if model.lora.lora_dim and (own or rates.learning_rate is None):  # else A's is that one
        scaled["lora_learning_rate"] = rates.lora_A_rate
    if rates.head_learning_rate is not None:
        scaled["head_learning_rate"] = rates.head_learning_rate
    return {name: float(f"{factor * rate:.2g}") for name, rate in scaled.items()}


def answers_to_judge(prompts: int, given: int) -> dict[str, int]:
    """Flag of as many answers to each of so many held-out prompts as an evaluation needs."""
    needed = math.ceil(ANSWERS_TO_JUDGE / prompts)
    return {"eval_answers_per_prompt": needed} if needed > given else {}


def haste(steps: int) -> float:
    """Factor on the critic's rate: it has so few optimizer steps to fit its values in."""
    return min(max(STEPS_OF_A_CRITIC / steps, 1.0), MOST_HASTE)


def fitted_length(length: RunLength, fixed: Sequence[str], wanted: int = FEW_STEPS) -> RunLength:
    """Length with enough steps and no long warm-up, but for what is the user's choice.

    Args:
        wanted: steps that are worth up to `MOST_EPOCHS`; for `FEW_STEPS` there may be more.
    """
    fitting = length if "gradient_accumulation_steps" in fixed else length.with_more_steps(wanted)
    if "num_train_epochs" not in fixed:
        fitting = fitting.with_more_epochs().with_more_epochs(wanted, MOST_EPOCHS)
    return fitting if "num_warmup_steps" in fixed else fitting.with_shorter_warm_up()


def as_long_as_seen(
    ctx: RunContext, settings: RLHFSettings
) -> tuple[RLHFSettings, dict[str, int | float]]:
    """Lower the limit of answers to the longest of the pairs that teach the reward model.

    Beyond it a score is a guess, and a policy that seldom ends its answers would get no other.
    """
    try:
        pairs = ctx.load_data(settings.data, RewardSettings.PHASE, settings.max_seq_len).train
    except UserError:
        return settings, {}  # prompts alone
    assert isinstance(pairs, datasets.Dataset), "no script streams"
    answers = np.subtract(pairs["length"], pairs["prompt_len"])
    longest = MULTIPLE * math.ceil(answers.max() / MULTIPLE)
    sampling = settings.ppo.sampling
    if longest >= sampling.max_answer_seq_len:
        return settings, {}
    sampling = replace(sampling, max_answer_seq_len=longest)
    settings = replace(settings, ppo=replace(settings.ppo, sampling=sampling))
    return settings, {"max_answer_seq_len": longest}
