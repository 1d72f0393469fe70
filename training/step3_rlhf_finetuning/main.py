"""Step 3, PPO: sample answers, score them, move the policy towards what scores well.

Each iteration: roll out `--generation_batches` batches of prompts, then train actor and critic on
them for `--ppo_epochs` passes. With `--actor_lora_dim` the reference is the actor with its adapters
off; with `--critic_lora_dim` the reward model is the critic's trunk with its adapters off: two
trunks on the device instead of four, or one with `--share_trunk all`. Writes OUTPUT/actor,
OUTPUT/critic where one is trained and, with `--enable_ema`, OUTPUT/actor_ema.

    deepspeed main.py --actor_model_name_or_path ./sft --critic_model_name_or_path ./reward \\
        --actor_zero_stage 2 --critic_zero_stage 2 --output_dir ./output
    python main.py --config settings.yaml --actor_lora_dim 16 --critic_lora_dim 16
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dschat.config import RLHFSettings
from dschat.config.cli import parse, run_cli
from dschat.config.unused import unused_flags, warm_up_beyond
from dschat.data.collators import PromptCollator
from dschat.data.datasets import create_prompt_dataset
from dschat.data.loaders import build_loader
from dschat.models.reward_model import RewardModel
from dschat.models.save import save_hf_format
from dschat.models.save_plan import SavePlan
from dschat.rlhf.generation import tell_unused_ends
from dschat.rlhf.ppo_log import PPOLog
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer
from dschat.rlhf.ptx import PTX
from dschat.rlhf.rewards import Rewards
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.role_settings import RoleNames
from dschat.rlhf.rollout_engine import TransformersRollout
from dschat.train.checkpointer import Checkpointer
from dschat.train.engine import accumulation_groups
from dschat.train.metrics import MetricLogger
from dschat.train.prepare import setup_run
from dschat.train.resume import RunPlan, StepPlan
from dschat.utils.distributed import (
    Distributed,
    from_local_main,
    launched_rank,
    print_rank_0,
    set_random_seed,
)
from dschat.utils.ds_utils import get_train_ds_config


def main() -> None:
    """Check, load, train, save."""
    settings = parse(RLHFSettings, None, __doc__)
    run = settings.run
    for line in unused_flags(settings):
        print_rank_0(line, launched_rank())

    # 1. everything that can be wrong is checked before weights are loaded
    ctx = setup_run(
        settings.roles.actor_model_name_or_path,
        run,
        output_dir=run.output_dir,
        prompt_format=settings.data.prompt_format,
    )
    tokenizer, distributed = ctx.tokenizer, ctx.distributed
    names = settings.role_names()
    retokenise = names.check(tokenizer, run.answer_end)
    rewards = Rewards.load(settings.rewards, names.reward)
    config = settings.ppo
    names.check_context(settings.max_seq_len, retokenise)
    plans = checked_plans(settings, names)
    data = create_prompt_dataset(
        settings.data,
        tokenizer,
        3,
        seed=run.seed,
        max_seq_len=settings.max_seq_len,
        max_prompt_len=settings.max_prompt_seq_len,
        once=from_local_main,
    )
    print_rank_0("\n".join(data.report.lines()))
    cache = settings.data.data_output_path
    text = settings.ptx.blocks(tokenizer, settings.max_seq_len, cache, from_local_main)
    collator = PromptCollator(tokenizer.pad_token_id)
    rollout_batch = config.per_device_generation_batch_size
    ranks = {"rank": ctx.rank, "world_size": ctx.world_size, "seed": run.seed}
    prompts = build_loader(data.train, collator, rollout_batch, shuffle=True, **ranks)
    held_out = build_loader(data.eval, collator, rollout_batch, shuffle=False, **ranks)
    batches = prompts.batches_in(0)  # those of every epoch
    iterations = settings.iterations(batches)
    for line in warm_up_beyond(settings, iterations):
        print_rank_0(line)
    setup = settings.role_setup(ctx.dtype_name, iterations, retokenise, rewards.scaling)
    for role in setup.trained.values():
        get_train_ds_config(role.engine, ctx.world_size)
    optimizers = {name: role.recipe.optimizer for name, role in setup.trained.items()}
    steps = StepPlan.of(
        run.num_train_epochs * [batches], settings.ppo.generation_batches, iterations
    )
    derived = rewards.record() | ({"unsupervised_dataset_name.rows": text.key} if text else {})
    plan = RunPlan("step 3 (PPO)", settings, optimizers, ctx.dtype_name, data.key, steps, derived)
    checkpointer = Checkpointer(run.checkpoint, run.output_dir, plan, distributed)

    tell_unused_ends(names.actor, tokenizer)

    # 2. the roles
    roles = DeepSpeedRLHFEngine.load(setup, tokenizer, distributed, settings.ema)
    fused = settings.fuse_lora_for_generation
    engine = TransformersRollout(roles.actor, tokenizer, roles.synced_gpus, fused)
    ptx = PTX(text, settings.ptx.unsup_coef, **ranks) if text else None
    trainer = DeepSpeedPPOTrainer(
        roles, config, ctx.world_size, engine, rewards, ptx, seed=run.seed
    )
    recipes = {name: role.recipe for name, role in setup.trained.items()}
    metrics = MetricLogger(run.log, run.output_dir, ctx.rank, checkpointer.continued)
    log = PPOLog(metrics, settings.answers_interval, roles, recipes, ctx.gpus, iterations)
    set_random_seed(run.seed + ctx.rank)
    position = checkpointer.restore(
        roles.trained,
        {"ppo": trainer, "ema": roles.ema, "ptx": ptx, "health": log.health},
        frozen={"reference": roles.reference, "reward": roles.reward},
    )

    # 3. train; evaluate before, at intervals, after each epoch
    iteration = position.step
    if iteration == 0:
        log.evaluation(iteration, trainer.evaluate(held_out))
    for epoch in range(position.epoch, steps.epochs):
        prompts.set_epoch(epoch, skip=position.batches(epoch))
        for batches in accumulation_groups(prompts, settings.ppo.generation_batches):
            if iteration == iterations:
                break
            log.begin()
            experiences = trainer.rollout(batches)
            log.rolled_out()
            statistics = trainer.train_rlhf(experiences)
            iteration += 1
            log.iteration(iteration, statistics, experiences, config.ppo_epochs)
            if settings.eval_interval and iteration % settings.eval_interval == 0:
                log.evaluation(iteration, trainer.evaluate(held_out))
            checkpointer.save_if_due(iteration, epoch)
        log.evaluation(iteration, trainer.evaluate(held_out))
        if iteration == iterations:
            break

    # 4. model folders that transformers loads
    if run.output_dir is not None:
        save(roles, plans, tokenizer, Path(run.output_dir), distributed)
    log.close()


def checked_plans(settings: RLHFSettings, names: RoleNames) -> dict[str, SavePlan]:
    """Plan the folder of each trained role; stop where its adapters cannot be saved."""
    run = settings.run
    actor, critic = run.recipe(settings.actor), run.recipe(settings.critic)
    plans = {"actor": run.save_plan(names.actor, actor, "actor", "actor_ema")}
    actor.check(names.actor, AutoModelForCausalLM.from_config)
    if names.critic is not None:
        critic.check(names.critic, RewardModel.from_config)
        plans["critic"] = run.save_plan(names.critic, critic, "critic")
    return plans


def save(
    roles: DeepSpeedRLHFEngine,
    plans: dict[str, SavePlan],
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    distributed: Distributed,
) -> None:
    """Write the folder of each role that trained, and of the actor's average."""
    for name, engine in roles.trained.items():
        save_hf_format(engine, tokenizer, output / name, distributed, plans[name])
    if roles.ema is not None:
        with roles.ema.applied() as averaged:
            folder = output / "actor_ema"
            save_hf_format(averaged, tokenizer, folder, distributed, plans["actor"])


if __name__ == "__main__":
    run_cli(main)
