"""Checks of a step before an earlier one has trained, and the flags that suit its rows.

A model that an earlier step will write is stood in for by the one that it starts from: it has the
same tokenizer, layers and size. Nothing is written but folders and tokenised rows, which the steps
find in the cache; no weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.cli import parse
from dschat.config.fitting import (
    STEPS_OF_A_REWARD_MODEL,
    answers_to_judge,
    as_long_as_seen,
    fitted_length,
    fitting_model,
    haste,
    scaled_rates,
    width_factor,
)
from dschat.data.datasets import PromptData
from dschat.models.config import Build, build_causal_lm
from dschat.models.reward_model import RewardModel
from dschat.rlhf.prepare import ROLE_FOLDERS, TrainingPlan, plan_roles, plan_training
from dschat.rlhf.role_checks import check_role_contexts
from dschat.rlhf.role_settings import RoleNames
from dschat.text.tokenizer import check_same_tokenizer
from dschat.train import run_lock
from dschat.train.disk import Written
from dschat.train.prepare import plan_model
from dschat.train.run_context import RunContext, setup_run
from dschat.train.run_length import FEW_STEPS, RunLength
from dschat.utils.distributed import Distributed

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
    model, flags = fitting_model(settings.model, stand_ins.get(name, name), build, "", widths)
    settings = replace(settings, model_name_or_path=stand_ins.get(name, name), model=model)
    plan = plan_model(ctx, settings, build)
    tokens = settings.batch.max_seq_len
    data = ctx.load_data(settings.data, settings.PHASE, tokens, later=plan.later)
    loader = ctx.loader(data.train, list, settings.sampler(), shuffle=True)
    batches = [loader.batches_in(epoch) for epoch in range(settings.run.num_train_epochs)]
    wanted = STEPS_OF_A_REWARD_MODEL if isinstance(settings, RewardSettings) else FEW_STEPS
    length = settings.length(batches)
    return _ahead(plan.name, data, length, [plan.written], flags, fixed, wanted)


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
    adapted, flags = fitting_model(
        settings.actor, actor, BUILDS["sft"], "actor_", widths, power=0.5
    )
    settings = replace(settings, actor=adapted)
    given = settings.critic
    if critic is not None:
        adapted, more = fitting_model(settings.critic, critic, BUILDS["reward"], "critic_", widths)
        settings, flags = replace(settings, critic=adapted), flags | more
    if waits:
        plan = _plan_stand_ins(
            ctx, settings, replace(names, actor=actor, critic=critic, reward=reward)
        )
    else:
        plan = plan_roles(ctx, settings).training
    if reward is not None:
        settings, more = as_long_as_seen(ctx, settings)
        flags |= more
    lengths = settings.max_seq_len, settings.max_prompt_seq_len
    data = ctx.load_data(settings.data, settings.PHASE, *lengths, later=plan.later)
    flags |= answers_to_judge(len(data.eval), settings.ppo.eval_answers_per_prompt)
    batch_size = settings.ppo.per_device_generation_batch_size
    batches = ctx.loader(data.train, list, batch_size, shuffle=True).batches_in(0)
    length = settings.length(settings.iterations(batches), batches)
    if critic is not None and "critic_" in widths:
        factor = width_factor(critic, widths["critic_"]) * haste(fitted_length(length, fixed).steps)
        flags |= {f"critic_{name}": rate for name, rate in scaled_rates(given, factor).items()}
    return _ahead(actor, data, length, plan.written, flags, fixed)


def _plan_stand_ins(ctx: RunContext, settings: RLHFSettings, names: RoleNames) -> TrainingPlan:
    """Plan roles of which an earlier stage will write some; `names` has what they begin with."""
    settings.run.check_output(*ROLE_FOLDERS)
    check_role_contexts(names, settings.max_seq_len, None)
    if names.critic is not None:
        check_same_tokenizer(ctx.tokenizer, names.critic, settings.run.answer_end)
    return plan_training(ctx, settings, names)


def _ahead(
    model: str,
    data: PromptData,
    length: RunLength,
    written: Sequence[Written],
    flags: dict[str, int | float],
    fixed: Sequence[str],
    wanted: int = FEW_STEPS,
) -> StepAhead:
    fitting = fitted_length(length, fixed, wanted)
    if fitting.accumulation != length.accumulation:
        flags = flags | {"gradient_accumulation_steps": fitting.accumulation}
    if fitting.epochs != length.epochs:
        flags = flags | {"num_train_epochs": fitting.epochs}
    if fitting.warm_up != length.warm_up:
        flags = flags | {"num_warmup_steps": fitting.warm_up}
    rows = data.report.train_rows
    assert rows is not None, "no script streams"
    return StepAhead(model, rows, fitting, tuple(written), flags)
