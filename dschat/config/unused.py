"""Warnings about flags without effect in a run's configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dschat.config.rlhf import RLHFSettings
from dschat.config.steps import DPOSettings, RewardSettings
from dschat.rlhf.role_setup import RoleSetup
from dschat.settings import Settings, flag_values, given_flags
from dschat.train.model_config import NONE, ModelConfig
from dschat.train.run_config import RunConfig
from dschat.train.step_settings import StepSettings
from dschat.utils.distributed import launched_rank, print_rank_0
from dschat.utils.module.lora_config import ALL_LINEAR

# A flag, and the one without which it does nothing.
SWITCHES = {
    "ema_decay": "enable_ema",
    "eot_token": "add_eot_token",
    "enable_test_mode": "test_stop_step",
    "eval_iters": "eval_interval",
    "print_answers_interval": "print_answers",
    "port": "live",
    "push_public": "push_to_hub",
    "save_total_limit": "save_steps",
    "test_stop_step": "enable_test_mode",
    "unsup_coef": "unsupervised_dataset_name",
}
# A flag, and the one that takes its place.
DISPLACED = {
    "language": "prompts",
    "max_prompts": "live",
    "output": "live",
    "temperature": "greedy",
    "top_k": "greedy",
    "top_p": "greedy",
    "modules_to_save": "train_base_model",
    "train_on": "train_on_prompt",
}
# Flags of `inspect` that some phases alone have a use for.
OF_PHASES = {
    "train_on": (1,),
    "sft_only_data_path": (1,),
    "max_seq_len": (1, 2),
    "max_tokens_per_batch": (1, 2),
    "max_prompt_seq_len": (3,),
}
NO_HEAD = "a language model has no head of its own"

# Of an iteration.
OF_LATER_STEPS = {
    *("cliprange", "cliprange_high", "importance_level", "cliprange_value", "update_kl_limit")
}


def tell_unused(settings: Settings) -> None:
    """Print a line, on rank 0, for each flag or key of a file that was given and does nothing."""
    for line in unused_flags(settings):
        print_rank_0(line, launched_rank())


def unused_flags(settings: Settings) -> Iterator[str]:
    """Yield a line, with the reason, for each flag that differs from its default without effect."""
    values, changed = flag_values(settings), [flag.name for flag in given_flags(settings)]
    for name in changed:
        if name in SWITCHES and not values.get(SWITCHES[name], True):
            yield f"--{name} does nothing without --{SWITCHES[name]}"
        if name in DISPLACED and values.get(DISPLACED[name]):
            yield f"--{name} does nothing: --{DISPLACED[name]} takes its place"
        phase = values.get("phase")
        if phase is not None and phase not in OF_PHASES.get(name, (phase,)):
            of = " and ".join(map(str, OF_PHASES[name]))
            yield f"--{name} does nothing in phase {phase}; it is of phase {of}"
    for name, reason in getattr(settings, "no_use", {}).items():
        if name in changed:
            yield f"--{name} does nothing: {reason}"
    if values.get("temperature") == 0:
        for name in ("top_p", "seed"):
            if name in changed:
                yield f"--{name} does nothing: at --temperature 0 nothing is drawn"
    if "tensorboard_path" in changed and not (
        values["enable_tensorboard"] or "tensorboard" in values["report_to"]
    ):
        yield "--tensorboard_path does nothing without --enable_tensorboard"
    if "seed" in changed and values.get("greedy"):
        yield "--seed does nothing: with --greedy nothing is drawn"
    if "max_seq_len" in changed and values.get("reward_model", "one") is None:
        yield "--max_seq_len does nothing without --reward_model"
    if isinstance(settings, StepSettings):
        if "per_device_train_batch_size" in changed and settings.batch.own_batching:
            yield (
                "--per_device_train_batch_size does nothing: --max_tokens_per_batch takes its place"
            )
        yield from _of_training(settings, settings.run, {"model": settings.model})
        if settings.trains_head_only and settings.model.gradient_checkpointing:
            yield "--gradient_checkpointing does nothing: no gradient goes through the frozen trunk"
        if not isinstance(settings, RewardSettings) and "head_learning_rate" in changed:
            yield f"--head_learning_rate does nothing: {NO_HEAD}"
        if isinstance(settings, DPOSettings):
            yield from settings.preference.unused()
    elif isinstance(settings, RLHFSettings):
        yield from _of_ppo(settings)


def _of_ppo(settings: RLHFSettings) -> Iterator[str]:
    setup = settings.role_setup("fp32", iterations=1)
    models = {"actor": settings.actor, "critic": settings.critic}
    yield from _of_training(settings, settings.run, {n: models[n] for n in setup.trained})
    if settings.actor.optimizer.head_learning_rate is not None:
        yield f"--actor_head_learning_rate does nothing: {NO_HEAD}"
    yield from _dropout(settings, setup)
    yield from _offload(settings, setup)
    if setup.critic is None:
        yield from _of_the_critic(settings, setup)
    given = {flag.name for flag in given_flags(settings)}
    is_rewarded = setup.reward is not None and settings.rewards.reward_model_weight != 0
    if "reward_clip" in given and not is_rewarded:
        yield (
            "--reward_clip does nothing: it clips a reward model's scores, and none of them count; "
            "a reward function's values are taken as they are"
        )
    if "reward_scaling" in given and not is_rewarded:
        yield (
            "--reward_scaling does nothing: it scales a reward model's scores, and none of them "
            "count"
        )
    answers = settings.ppo.per_device_generation_batch_size * settings.ppo.answers_per_prompt
    if settings.ppo.generation_chunk_size >= answers:
        yield f"--generation_chunk_size does nothing: a device samples {answers} answers at a time"
    if settings.enable_test_mode and 0 < settings.max_steps <= settings.test_stop_step:
        yield "--test_stop_step does nothing: --max_steps ends the run before"
    if settings.updates == 1:
        for name in sorted(given & OF_LATER_STEPS):
            yield (
                f"--{name} does nothing: an iteration has one optimizer step, which begins at the "
                "policy and the values that sampled"
            )
    has_adapters = any(role.config.lora.lora_dim for role in setup.trained.values())
    if setup.share_trunk == "none" and not has_adapters:
        yield "--share_trunk none does nothing: without LoRA no trunk is shared"


def _of_training(
    settings: Settings, run: RunConfig, models: Mapping[str, ModelConfig]
) -> Iterator[str]:
    """Find flags of adapters for a model that trains all its weights, and of other schedules."""
    for name, model in models.items():
        prefix = "" if name == "model" else f"{name}_"
        changed = [flag for flag in given_flags(settings) if flag.path[0] == name]
        of_adapters = ("lora", "trainable_tokens")
        flags = [f for f in changed if f.path[1] == "lora" or f.path[-1].startswith(of_adapters)]
        names = [f"--{flag.name}" for flag in flags]
        if names and not model.lora.lora_dim:
            yield f"{_listed(names)} nothing: without --{prefix}lora_dim there are no adapters"
        rate = f"--{prefix}lora_embedding_learning_rate"
        if model.lora.lora_dim and rate in names and model.lora.lora_module_name == (ALL_LINEAR,):
            yield f"{rate} does nothing: --{prefix}lora_module_name names no embedding"
        rate = f"--{prefix}trainable_tokens_learning_rate"
        if model.lora.lora_dim and rate in names and model.trainable_tokens == NONE:
            yield f"{rate} does nothing with --{prefix}trainable_tokens none"
    if not any(model.lora.lora_dim for model in models.values()):
        for name in ("only_optimize_lora", "train_base_model"):
            if getattr(run, name):
                yield f"--{name} does nothing: without LoRA all weights train"
        if run.lora_save == "merged":
            yield "--lora_save merged does nothing: without LoRA there is nothing to merge"
    given = {flag.name for flag in given_flags(settings)}
    yield from run.engine.user_config_effects()
    if (run.num_warmup_steps or 0) > run.warm_up and "num_warmup_steps" in given:
        yield "--num_warmup_steps does nothing: --lr_scheduler_type constant never changes the rate"


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
