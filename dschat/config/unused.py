"""Warnings about step-3 flags without effect in a run's configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dschat.config.rlhf import RLHFSettings
from dschat.rlhf.role_setup import RoleSetup
from dschat.settings import flag_values, given_flags

SWITCHES = {
    "ema_decay": "enable_ema",
    "print_answers_interval": "print_answers",
    "test_stop_step": "enable_test_mode",
    "enable_test_mode": "test_stop_step",
    "unsup_coef": "unsupervised_dataset_name",
}


def unused_flags(settings: RLHFSettings) -> Iterator[str]:
    """Yield a line, with the reason, for each flag that differs from its default without effect."""
    setup = settings.role_setup("fp32", iterations=1)
    yield from _without_switch(settings)
    yield from _without_adapters(settings, setup)
    if settings.actor.optimizer.head_learning_rate is not None:
        yield "--actor_head_learning_rate does nothing: a language model has no head of its own"
    yield from _dropout(settings, setup)
    yield from _offload(settings, setup)
    if setup.critic is None:
        yield from _of_the_critic(settings, setup)
    if setup.reward is None and "reward_clip" in {flag.name for flag in given_flags(settings)}:
        yield (
            "--reward_clip does nothing: it clips a reward model's scores, and there is none; a "
            "reward function's values are taken as they are"
        )
    if setup.share_trunk == "none" and not _has_adapters(setup):
        yield "--share_trunk none does nothing: without LoRA no trunk is shared"


def _has_adapters(setup: RoleSetup) -> bool:
    return any(role.config.lora.lora_dim for role in setup.trained.values())


def _without_switch(settings: RLHFSettings) -> Iterator[str]:
    values, changed = flag_values(settings), {flag.name for flag in given_flags(settings)}
    for name, switch in SWITCHES.items():
        if name in changed and not values[switch]:
            yield f"--{name} does nothing without --{switch}"


def _without_adapters(settings: RLHFSettings, setup: RoleSetup) -> Iterator[str]:
    """Find flags of adapters for a role that trains all its weights."""
    for name, role in setup.trained.items():
        changed = [flag for flag in given_flags(settings) if flag.path[0] == name]
        flags = [f for f in changed if f.path[1] == "lora" or f.path[-1].startswith("lora")]
        if flags and not role.config.lora.lora_dim:
            names = [f"--{flag.name}" for flag in flags]
            yield f"{_listed(names)} nothing: without --{name}_lora_dim there are no adapters"
    if settings.run.train_base_model and not _has_adapters(setup):
        yield "--train_base_model does nothing: without LoRA all weights train"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'does' if len(names) == 1 else 'do'}"


def _dropout(settings: RLHFSettings, setup: RoleSetup) -> Iterator[str]:
    models = {"actor": settings.actor, "critic": settings.critic}
    for name in setup.trained:
        model = models[name]
        probabilities = {"dropout": model.dropout, "lora_dropout": model.lora.lora_dropout}
        for flag_name in (n for n, probability in probabilities.items() if probability):
            yield (
                f"--{name}_{flag_name} does nothing: PPO compares probabilities of one and "
                "the same function, so all dropout is off"
            )


def _offload(settings: RLHFSettings, setup: RoleSetup) -> Iterator[str]:
    roles = settings.roles
    for name, trained, offloads, is_switch in (
        ("reference", "actor", roles.offload_reference_model, setup.reference_is_actors),
        ("reward", "critic", roles.offload_reward_model, setup.reward_is_critics),
    ):
        if not offloads:
            continue
        if name == "reward" and setup.reward is None:
            yield "--offload_reward_model does nothing: there is no reward model"
        elif is_switch:
            yield (
                f"--offload_{name}_model does nothing: with LoRA the {name} model is the "
                f"{trained} with its adapters off, not a copy"
            )
        elif setup.share_trunk == "all":
            yield f"--offload_{name}_model does nothing: its weights are the actor's"


def _of_the_critic(settings: RLHFSettings, setup: RoleSetup) -> Iterator[str]:
    names = [f"--{f.name}" for f in given_flags(settings) if f.path[0] == "critic"]
    if setup.reward is not None and "--critic_zero_stage" in names:
        names.remove("--critic_zero_stage")  # the frozen reward model is sharded by it
    if names:
        yield (
            f"{_listed(names)} nothing: "
            f"--advantage_estimator {settings.ppo.advantage_estimator} trains no critic"
        )
