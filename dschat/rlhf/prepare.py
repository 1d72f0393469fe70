"""Preparation of a PPO run: everything between the data and the training loop.

1. `plan_roles`: check the models of the roles, without their weights
2. `prepare`: plan the iterations, find the checkpoint, load the roles, build the trainer
3. `PPORun.start`: open the log, seed this rank, restore the checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from dschat.data.batching import Loader
from dschat.data.datasets import PromptData
from dschat.data.stream import StreamLoader
from dschat.models.config import build_causal_lm, check_attention
from dschat.models.reward_model import RewardModel
from dschat.models.reward_statistics import read_statistics
from dschat.models.save import save_hf_format
from dschat.models.save_plan import SavePlan
from dschat.rlhf.ahead import RolloutsAhead
from dschat.rlhf.dynamic_sampling import SparePrompts
from dschat.rlhf.engines import choose_engine
from dschat.rlhf.generation import tell_unused_ends
from dschat.rlhf.ppo_health import HealthMonitor
from dschat.rlhf.ppo_log import PPOLog
from dschat.rlhf.ppo_rules import RunFacts
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer
from dschat.rlhf.ptx import PTX
from dschat.rlhf.retokenise import Retokeniser
from dschat.rlhf.rewards import Rewards
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.role_checks import check_role_contexts, check_roles
from dschat.rlhf.role_settings import RoleNames
from dschat.rlhf.role_setup import RoleConfig, RoleSetup
from dschat.rlhf.run_settings import PPORunSettings
from dschat.rlhf.vllm_setup import check_servers
from dschat.train.checkpoint_source import Position
from dschat.train.checkpointer import Checkpointer
from dschat.train.disk import Written, reserve
from dschat.train.prepare import PreparedRun
from dschat.train.resume import RunPlan, model_files
from dschat.train.run_context import RunContext
from dschat.train.steps import StepPlan
from dschat.train.trainable_tokens import asked_tokens, choose_tokens
from dschat.utils.distributed import print_rank_0, set_random_seed
from dschat.utils.ds_utils import get_train_ds_config
from dschat.utils.files import Reserve
from dschat.utils.waiting import from_local_main

ROLE_FOLDERS = ("actor", "critic", "actor_ema")  # in the output folder


@dataclass(frozen=True)
class TrainingPlan:
    """What is saved of each trained role, and the bytes that this takes."""

    saves: dict[str, SavePlan]
    written: list[Written]
    output_dir: str

    @property
    def later(self) -> Reserve:
        """Folders that the roles become, which the data must leave room for."""
        return reserve(self.output_dir, self.written)


@dataclass(frozen=True)
class RolePlan:
    """Models of the roles, checked before their weights load.

    Attributes:
        retokenise: for a reward model that reads other tokens than the actor's.
    """

    names: RoleNames
    rewards: Rewards
    retokenise: Retokeniser | None
    training: TrainingPlan


def plan_roles(ctx: RunContext, settings: PPORunSettings) -> RolePlan:
    """Check the model of each role, how it trains and how it is saved.

    Raises:
        UserError: a folder that cannot serve in its role, a reward that cannot be computed, or
            adapters that cannot be trained or saved.
    """
    run, names = settings.run, settings.role_names()
    run.check_output(*ROLE_FOLDERS)
    retokenise = check_roles(names, ctx.tokenizer, run.answer_end)
    rewards = Rewards.load(settings.rewards, names.reward)
    check_role_contexts(names, settings.max_seq_len, retokenise)
    given = [n for n in (names.actor, names.critic, names.reward) if n is not None]
    check_attention(run.attn_implementation, ctx.dtype_name, *given)
    check_servers(settings, ctx.tokenizer)
    return RolePlan(names, rewards, retokenise, plan_training(ctx, settings, names))


def plan_training(ctx: RunContext, settings: PPORunSettings, names: RoleNames) -> TrainingPlan:
    """Check how the trained roles train and how they are saved.

    Raises:
        UserError: adapters that cannot be trained or saved.
    """
    run, plan = settings.run, TrainingPlan({}, [], settings.run.output_dir)
    micro_batch = settings.ppo.per_device_training_batch_size
    actor = (names.actor, settings.actor, build_causal_lm, ("actor", "actor_ema"))
    critic = (names.critic, settings.critic, RewardModel.from_config, ("critic",))
    for name, model, build, folders in (actor, critic):
        if name is None:
            continue
        tokens = asked_tokens(model.trainable_tokens, ctx.tokenizer, f"{folders[0]}_")
        config = replace(run.complete(model), tokens=tokens)
        size = config.check(name, build)
        save = plan.saves[folders[0]] = run.save_plan(name, config, *folders)
        engine = run.engine_config(model, ctx.dtype_name, micro_batch)
        averaged = settings.ema.enable_ema and len(folders) == 2
        plan.written.append(Written.of(size, engine, save, averaged))
    return plan


@dataclass(frozen=True)
class PPORun(PreparedRun):
    """PPO run whose roles are loaded; `steps` are iterations."""

    MODEL: ClassVar[str] = "actor"

    settings: PPORunSettings
    plan: RolePlan
    setup: RoleSetup
    trainer: DeepSpeedPPOTrainer

    def start(self) -> tuple[PPOLog, Position]:
        """Open the log, seed this rank, and restore the checkpoint where the run resumes."""
        ctx, roles = self.ctx, self.trainer.roles
        configs = {name: role.config for name, role in self.setup.trained.items()}
        log = PPOLog(
            self.open_metrics(),
            self.settings.answers_interval,
            roles,
            configs,
            ctx.gpus,
            self.steps.total_steps,
            health_monitor(self.settings, self.plan.names.reward, self.steps.total_steps),
            self.plan.rewards.names,
        )
        set_random_seed(ctx.seed + ctx.rank)
        position = self.checkpointer.restore(
            roles.trained,
            {
                **{"ppo": self.trainer, "ema": roles.ema, "ptx": self.trainer.ptx},
                **{"spare": self.trainer.spare, "health": log.health},
                "ahead": self.trainer.ahead,
            },
            frozen={"reference": roles.reference, "reward": roles.reward},
        )
        return log, position

    def save(self) -> None:
        """Write the folder of each trained role, and of the actor's average."""
        ctx, roles, output = self.ctx, self.trainer.roles, Path(self.config.output_dir)
        for name, engine in roles.trained.items():
            plan = self.plan.training.saves[name]
            save_hf_format(engine, ctx.tokenizer, output / name, ctx, plan)
        if roles.ema is not None:
            plan = self.plan.training.saves["actor"]
            with roles.ema.applied() as averaged:
                folder = output / "actor_ema"
                save_hf_format(averaged, ctx.tokenizer, folder, ctx, plan)


def _with_tokens(
    role: RoleConfig, tokenizer: PreTrainedTokenizerBase, data: PromptData
) -> RoleConfig:
    """Set which tokens' rows of a role may train."""
    tokens = choose_tokens(role.config.trainable_tokens, tokenizer, data)
    return replace(role, config=replace(role.config, tokens=tokens))


def prepare(
    ctx: RunContext,
    settings: PPORunSettings,
    plan: RolePlan,
    data: PromptData,
    prompts: Loader | StreamLoader,
) -> PPORun:
    """Plan the iterations, find the checkpoint to resume from, load the roles.

    Raises:
        UserError: a checkpoint of another run, or weights that do not fit.
    """
    run, config, tokenizer = settings.run, settings.ppo, ctx.tokenizer
    cache, kept = settings.data.data_output_path, settings.data.keep_special_tokens
    text = settings.ptx.blocks(tokenizer, settings.max_seq_len, cache, from_local_main, kept)
    batches = prompts.batches_in(0)  # those of every epoch
    iterations = settings.iterations(batches)
    length = settings.length(iterations, batches)
    per_iteration = settings.batches_per_iteration
    steps = StepPlan.of(run.num_train_epochs * [batches], per_iteration, iterations)
    lines = [*(text.lines() if text else ()), *run.remarks(steps, settings.eval_interval)]
    for line in (*lines, *settings.remarks(iterations), *length.advice()):
        print_rank_0(line)
    rewards = plan.rewards
    setup = settings.role_setup(ctx.dtype_name, iterations, plan.retokenise, rewards.scaling)
    trained = {name: _with_tokens(role, tokenizer, data) for name, role in setup.trained.items()}
    setup = replace(setup, actor=trained["actor"], critic=trained.get("critic"))
    for role in setup.trained.values():
        get_train_ds_config(role.engine, ctx.world_size)
    run.check_disk(plan.training.written, iterations)
    optimizers = {name: role.config.optimizer for name, role in setup.trained.items()}
    derived = rewards.record() | ({"unsupervised_dataset_name.rows": text.key} if text else {})
    files, dtype = model_files(settings), ctx.dtype_name
    run_plan = RunPlan(settings.KIND, settings, optimizers, dtype, data.key, steps, derived, files)
    checkpointer = Checkpointer(run.checkpoint, run.output_dir, run_plan, ctx)
    tell_unused_ends(plan.names.actor, tokenizer)

    roles = DeepSpeedRLHFEngine.load(setup, tokenizer, ctx, settings.ema)
    engine = choose_engine(settings, roles, tokenizer, ctx)
    ranks = {"rank": ctx.rank, "world_size": ctx.world_size}
    ptx = PTX(text, settings.ptx.unsup_coef, seed=ctx.seed, **ranks) if text else None
    spare = SparePrompts.of(ctx, config, data) if config.policy.dynamic_sampling_rounds else None
    ahead = RolloutsAhead(ctx) if config.rollouts_ahead else None
    trainer = DeepSpeedPPOTrainer(
        roles, config, ctx.world_size, engine, rewards, ptx, spare, ahead, seed=ctx.seed
    )
    return PPORun(ctx, settings, run, steps, checkpointer, plan, setup, trainer)


def health_monitor(
    settings: PPORunSettings, reward_model: str | None, iterations: int
) -> HealthMonitor:
    """Make the monitor of a run with this reward model; it names remedies that the run has."""
    rewards, actor, ppo = settings.rewards, settings.actor, settings.ppo
    has_unit = reward_model is not None and read_statistics(reward_model) is not None
    has_own_rate = actor.lora.lora_dim and actor.optimizer.lora_learning_rate is not None
    facts = RunFacts(
        has_reward_model=reward_model is not None and rewards.reward_model_weight != 0,
        has_reward_function=bool(rewards.reward_function),
        can_scale=has_unit and rewards.reward_scaling == "none",
        is_scaled=has_unit and rewards.reward_scaling != "none",
        fuses_adapters=settings.rollouts.fuse_lora_for_generation,
        has_kl_target=ppo.kl_target is not None,
        masks_truncated=ppo.policy.mask_truncated_answers,
        ppo_epochs=ppo.ppo_epochs,
        rate="actor_lora_learning_rate" if has_own_rate else "actor_learning_rate",
        filters=ppo.sampling.filters,
        samples_ahead=ppo.rollouts_ahead > 0,
    )
    updates = settings.updates
    return HealthMonitor(facts, settings.warm_up(iterations) / updates, updates)
