"""Flags of step 3 that were given and do nothing in the run as it is cast, with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dschat.rlhf.role_config import Cast
from dschat.settings import flag_values, given_flags
from dschat.train.run_config import ModelConfig


def unused_flags(settings: Any, cast: Cast, trained: Mapping[str, ModelConfig]) -> Iterator[str]:
    """A line for each of them.

    Args:
        settings: `RLHFSettings`. trained: of the roles that train.
    """
    yield from _without_switch(settings)
    yield from _without_adapters(settings, trained)
    if settings.actor.optimizer.head_learning_rate is not None:
        yield "--actor_head_learning_rate does nothing: a language model has no head of its own"
    yield from _dropout(trained)
    yield from _offload(settings, cast)
    if cast.critic is None:
        yield from _of_the_critic(settings, cast)
    if cast.share_trunk == "none" and not any(m.lora.lora_dim for m in trained.values()):
        yield "--share_trunk none does nothing: without LoRA no trunk is shared"


SWITCHES = {
    "ema_decay": "enable_ema",
    "print_answers_interval": "print_answers",
    "test_stop_step": "enable_test_mode",
    "enable_test_mode": "test_stop_step",
    "unsup_coef": "unsupervised_dataset_name",
}


def _without_switch(settings: Any) -> Iterator[str]:
    values, given = flag_values(settings), {flag.name for flag in given_flags(settings)}
    for name, needed in SWITCHES.items():
        if name in given and not values[needed]:
            yield f"--{name} does nothing without --{needed}"


def _without_adapters(settings: Any, trained: Mapping[str, ModelConfig]) -> Iterator[str]:
    """Flags of adapters, which a role that trains all its weights has none of."""
    for role in (name for name, model in trained.items() if not model.lora.lora_dim):
        given = [flag for flag in given_flags(settings) if flag.path[0] == role]
        of_adapters = [f for f in given if f.path[1] == "lora" or f.path[-1].startswith("lora")]
        names = [f"--{flag.name}" for flag in of_adapters]
        if names:
            yield f"{_listed(names)} nothing: without --{role}_lora_dim there are no adapters"
    if settings.run.train_base_model and not any(m.lora.lora_dim for m in trained.values()):
        yield "--train_base_model does nothing: without LoRA all weights train"


def _listed(names: list[str]) -> str:
    return f"{', '.join(names)} {'does' if len(names) == 1 else 'do'}"


def _dropout(trained: Mapping[str, ModelConfig]) -> Iterator[str]:
    for name, model in trained.items():
        given = {"dropout": model.dropout, "lora_dropout": model.lora.lora_dropout}
        for flag_name in (n for n, value in given.items() if value):
            yield (
                f"--{name}_{flag_name} does nothing: PPO compares probabilities of one and "
                "the same function, so all dropout is off"
            )


def _offload(settings: Any, cast: Cast) -> Iterator[str]:
    with_one_trunk = cast.share_trunk == "all"
    for name, kept, asked, is_switch in (
        ("reference", "actor", settings.offload_reference_model, cast.reference_is_actors),
        ("reward", "critic", settings.offload_reward_model, cast.reward_is_critics),
    ):
        if not asked:
            continue
        if name == "reward" and cast.reward is None:
            yield "--offload_reward_model does nothing: there is no reward model"
        elif is_switch:
            yield (
                f"--offload_{name}_model does nothing: with LoRA the {name} model is the "
                f"{kept} with its adapters off, not a copy"
            )
        elif with_one_trunk:
            yield f"--offload_{name}_model does nothing: its weights are the actor's"


def _of_the_critic(settings: Any, cast: Cast) -> Iterator[str]:
    # The group of the critic's training.
    given = [f"--{f.name}" for f in given_flags(settings) if f.path[:1] == ("critic",)]
    if cast.reward is not None and "--critic_zero_stage" in given:
        given.remove("--critic_zero_stage")  # the frozen reward model is sharded by it
    if given:
        yield (
            f"{_listed(given)} nothing: "
            f"--advantage_estimator {settings.ppo.advantage_estimator} trains no critic"
        )
