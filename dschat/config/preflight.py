"""Checks of a step before an earlier one has trained, and the flags that suit its rows.

A model that an earlier step will write is stood in for by the one that it starts from: it has the
same tokenizer, layers and size. Nothing is written but folders and tokenised rows, which the steps
find in the cache; no weights are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.cli import parse
from dschat.data.datasets import PromptData
from dschat.errors import UserError
from dschat.models.config import Build, build_causal_lm, load_config, on_meta
from dschat.models.reward_model import RewardModel
from dschat.rlhf.prepare import ROLE_FOLDERS, plan_roles, plan_training
from dschat.rlhf.role_checks import check_role_contexts
from dschat.text.tokenizer import check_same_tokenizer
from dschat.train import run_lock
from dschat.train.adapter_ranks import adapted_shapes, fitting_dim
from dschat.train.disk import Written
from dschat.train.model_config import ModelConfig
from dschat.train.prepare import plan_model
from dschat.train.run_context import RunContext, setup_run
from dschat.train.run_length import RunLength
from dschat.utils.distributed import Distributed

# Optimizer steps that a critic takes to fit its values at the scripts' rates, and how much faster a
# short run lets it learn at most: as fast as step 2 taught the same trunk (docs/ppo/update.md).
STEPS_OF_A_CRITIC, MOST_HASTE = 360, 10

# Answers of an evaluation by which a gain of a third of the rewards' spread shows: the standard error
# of a difference is an eighth of it.
ANSWERS_TO_JUDGE = 128
MULTIPLE = 8  # of tokens, of an answer's limit

OneModelSettings = SFTSettings | RewardSettings | DPOSettings
OF_ONE_MODEL: dict[str, type[OneModelSettings]] = {
    "sft": SFTSettings,
    "reward": RewardSettings,
    "dpo": DPOSettings,
}
BUILDS: dict[str, Build] = {
    "sft": build_causal_lm,
    "reward": RewardModel.from_config,
    "dpo": build_causal_lm,
}


@dataclass(frozen=True)
class StepAhead:
    """A step that can run.

    Attributes:
        model: that it trains, in step 3 the actor. rows: to train on. written: by each model.
        flags: those that suit the rows and the models better than what the step was given.
        length: with these flags.
    """

    model: str
    rows: int
    length: RunLength
    written: tuple[Written, ...]
    flags: dict[str, int | float]


def look_ahead(
    kind: str,
    argv: Sequence[str],
    stand_ins: Mapping[str, str],
    process: Distributed,
    fixed: Sequence[str] = (),
    widths: Mapping[str, int] | None = None,
) -> StepAhead:
    """Check a step's settings, models, output folder and data.

    Args:
        kind: sft, reward, dpo or ppo. argv: of its main.py.
        stand_ins: the model that each folder of an earlier step starts from.
        process: one of those that will train. fixed: flags that are the user's choice.
        widths: hidden size of the models that the rates in `argv` are meant for, by the prefix of
            their flags; without an entry rates stay.

    Raises:
        UserError: what would stop the step.
    """
    widths = widths or {}
    if kind == "ppo":
        rlhf = parse(RLHFSettings, argv, None)
        with run_lock.released_after(rlhf.run.output_dir):  # the step itself will hold it
            return _look_at_ppo(rlhf, stand_ins, process, fixed, widths)
    settings = parse(OF_ONE_MODEL[kind], argv, None)
    with run_lock.released_after(settings.run.output_dir):
        return _look_at_one_model(settings, BUILDS[kind], stand_ins, process, fixed, widths)


def _look_at_one_model(
    settings: OneModelSettings,
    build: Build,
    stand_ins: Mapping[str, str],
    process: Distributed,
    fixed: Sequence[str],
    widths: Mapping[str, int],
) -> StepAhead:
    name = settings.model_name_or_path
    ctx = setup_run(
        stand_ins.get(name, name),
        settings.run,
        prompt_format=settings.data.prompt_format,
        teaches_format=settings.PHASE == 1 or name in stand_ins,
        process=process,
    )
    model, flags = _fitting_model(settings.model, stand_ins.get(name, name), build, "", widths)
    settings = replace(settings, model_name_or_path=stand_ins.get(name, name), model=model)
    plan = plan_model(ctx, settings, build)
    length = settings.batch.max_seq_len
    data = ctx.load_data(settings.data, settings.PHASE, length, later=plan.later)
    loader = ctx.loader(data.train, list, settings.sampler(), shuffle=True)
    batches = [loader.batches_in(epoch) for epoch in range(settings.run.num_train_epochs)]
    return _ahead(plan.name, data, settings.length(batches), [plan.written], flags, fixed)


def _look_at_ppo(
    settings: RLHFSettings,
    stand_ins: Mapping[str, str],
    process: Distributed,
    fixed: Sequence[str],
    widths: Mapping[str, int],
) -> StepAhead:
    names = settings.role_names()
    waits = {name for name in (names.actor, names.critic, names.reward) if name in stand_ins}
    actor, critic, reward = (
        name and stand_ins.get(name, name) for name in (names.actor, names.critic, names.reward)
    )
    assert actor is not None
    ctx = setup_run(
        actor,
        settings.run,
        prompt_format=settings.data.prompt_format,
        teaches_format=names.actor in waits,
        process=process,
    )
    # A policy is held near where it began: by the root it stays there and earns the same reward
    # (docs/ppo/update.md).
    adapted, flags = _fitting_model(
        settings.actor, actor, BUILDS["sft"], "actor_", widths, power=0.5
    )
    settings = replace(settings, actor=adapted)
    given = settings.critic
    if critic is not None:
        adapted, more = _fitting_model(settings.critic, critic, BUILDS["reward"], "critic_", widths)
        settings, flags = replace(settings, critic=adapted), flags | more
    if waits:
        settings.run.check_output(*ROLE_FOLDERS)
        names = replace(names, actor=actor, critic=critic, reward=reward)
        check_role_contexts(names, settings.max_seq_len, None)
        if critic is not None:
            check_same_tokenizer(ctx.tokenizer, critic, settings.run.answer_end)
        plan = plan_training(ctx, settings, names)
    else:
        plan = plan_roles(ctx, settings).training
    if reward is not None and "max_answer_seq_len" not in fixed:
        settings, more = _as_long_as_seen(ctx, settings)
        flags |= more
    lengths = settings.max_seq_len, settings.max_prompt_seq_len
    data = ctx.load_data(settings.data, settings.PHASE, *lengths, later=plan.later)
    if (answers := math.ceil(ANSWERS_TO_JUDGE / len(data.eval))) > settings.ppo.eval_answers_per_prompt:
        flags["eval_answers_per_prompt"] = answers
    batch_size = settings.ppo.per_device_generation_batch_size
    batches = ctx.loader(data.train, list, batch_size, shuffle=True).batches_in(0)
    length = settings.length(settings.iterations(batches), batches)
    if critic is not None and "critic_" in widths:
        factor = _factor(critic, widths["critic_"]) * _haste(_fitted(length, fixed).steps)
        flags |= {f"critic_{name}": rate for name, rate in _scaled_rates(given, factor).items()}
    return _ahead(actor, data, length, plan.written, flags, fixed)


def _as_long_as_seen(
    ctx: RunContext, settings: RLHFSettings
) -> tuple[RLHFSettings, dict[str, int | float]]:
    """Lower the limit of answers to the longest of the pairs that teach the reward model.

    Beyond it a score is a guess, and a policy that seldom ends its answers would get no other.
    """
    try:
        pairs = ctx.load_data(settings.data, RewardSettings.PHASE, settings.max_seq_len).train
    except UserError:
        return settings, {}  # prompts alone
    answers = np.subtract(pairs["length"], pairs["prompt_len"])
    longest = MULTIPLE * math.ceil(answers.max() / MULTIPLE)
    sampling = settings.ppo.sampling
    if longest >= sampling.max_answer_seq_len:
        return settings, {}
    sampling = replace(sampling, max_answer_seq_len=longest)
    settings = replace(settings, ppo=replace(settings.ppo, sampling=sampling))
    return settings, {"max_answer_seq_len": longest}


def _haste(steps: int) -> float:
    """Factor on the critic's rate: it has so few optimizer steps to fit its values in."""
    return min(max(STEPS_OF_A_CRITIC / steps, 1.0), MOST_HASTE)


def _fitting_model(
    model: ModelConfig,
    name: str,
    build: Build,
    prefix: str,
    widths: Mapping[str, int],
    power: float = 1.0,
) -> tuple[ModelConfig, dict[str, int | float]]:
    """Fit adapters and rates to the model: its layers may be smaller, or larger, than foreseen."""
    factor = _factor(name, widths[prefix]) ** power if prefix in widths else 1.0
    flags = {f"{prefix}{key}": rate for key, rate in _scaled_rates(model, factor).items()}
    if model.lora.lora_dim:
        shapes = adapted_shapes(on_meta(name, build), model.lora)
        if (fitting := fitting_dim(shapes, model.lora.lora_dim)) < model.lora.lora_dim:
            model = replace(model, lora=replace(model.lora, lora_dim=fitting))
            flags[f"{prefix}lora_dim"] = fitting
    return model, flags


def _factor(name: str, meant_for: int) -> float:
    """Width that rates are meant for over the model's; 1 for a family without one."""
    width = getattr(load_config(name).get_text_config(), "hidden_size", None)
    return meant_for / width if width else 1.0


def _scaled_rates(model: ModelConfig, factor: float) -> dict[str, float]:
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


def _fitted(length: RunLength, fixed: Sequence[str]) -> RunLength:
    """Length with enough steps and no long warm-up, but for what is the user's choice."""
    fitting = length if "gradient_accumulation_steps" in fixed else length.with_more_steps()
    if "num_train_epochs" not in fixed:
        fitting = fitting.with_more_epochs()
    return fitting if "num_warmup_steps" in fixed else fitting.with_shorter_warm_up()


def _ahead(
    model: str,
    data: PromptData,
    length: RunLength,
    written: Sequence[Written],
    flags: dict[str, int | float],
    fixed: Sequence[str],
) -> StepAhead:
    fitting = _fitted(length, fixed)
    if fitting.accumulation != length.accumulation:
        flags = flags | {"gradient_accumulation_steps": fitting.accumulation}
    if fitting.epochs != length.epochs:
        flags = flags | {"num_train_epochs": fitting.epochs}
    if fitting.warm_up != length.warm_up:
        flags = flags | {"num_warmup_steps": fitting.warm_up}
    rows = data.report.train_rows
    assert rows is not None, "no script streams"
    return StepAhead(model, rows, fitting, tuple(written), flags)
