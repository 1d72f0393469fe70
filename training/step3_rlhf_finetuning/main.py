"""Step 3, PPO: sample answers, score them, move the policy towards what scores well.

Each iteration: roll out `--generation_batches` batches of prompts, then train actor and critic on
them for `--ppo_epochs` passes. With `--actor_lora_dim` the reference is the actor with its adapters
off; with `--critic_lora_dim` the reward model is the critic's trunk with its adapters off: two
trunks on the device instead of four. Writes OUTPUT/actor, OUTPUT/critic and, with `--enable_ema`,
OUTPUT/actor_ema.

    deepspeed main.py --actor_model_name_or_path ./sft --critic_model_name_or_path ./reward \\
        --actor_zero_stage 2 --critic_zero_stage 2 --output_dir ./output
    python main.py --config settings.yaml --actor_lora_dim 16 --critic_lora_dim 16
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM

from dschat.arguments import RLHFSettings
from dschat.cli import parse, run_cli
from dschat.rlhf.ppo_log import PPOLog
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer
from dschat.rlhf.ptx import PTX
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.utils.checkpoint import save_hf_format
from dschat.utils.data.collators import PromptCollator
from dschat.utils.data.data_utils import create_prompt_dataset
from dschat.utils.data.loaders import build_loader
from dschat.utils.distributed import from_local_main, print_rank_0, set_random_seed
from dschat.utils.ds_utils import get_train_ds_config
from dschat.utils.engine import windows
from dschat.utils.model.model_utils import check_context
from dschat.utils.model.reward_model import RewardModel, check_reward_head
from dschat.utils.model.tokenizer import check_same_tokenizer
from dschat.utils.startup import start
from dschat.utils.training_plan import Course, EnginePlan, Plan
from dschat.utils.training_state import TrainingStates


def main() -> None:
    """Check, load, train, save."""
    settings = parse(RLHFSettings, None, __doc__)
    run = settings.run

    # 1. everything that can be wrong is checked before weights are loaded
    begun = start(
        settings.ppo.actor_model_name_or_path,
        dtype=run.dtype,
        seed=run.seed,
        output_dir=run.output_dir,
        eot_token=run.answer_end,
        prompt_format=settings.data.prompt_format,
    )
    tokenizer, distributed = begun.tokenizer, begun.distributed
    actor_name = settings.ppo.actor_model_name_or_path
    critic_name = settings.ppo.critic_model_name_or_path
    check_same_tokenizer(tokenizer, critic_name, run.answer_end)
    check_reward_head(critic_name)
    rewards = settings.rewards.rewards(critic_name)
    config = settings.ppo_config()
    spec = settings.data_spec()
    for name in (actor_name, critic_name):
        check_context(name, spec.max_seq_len, "max_prompt_seq_len and max_answer_seq_len")
    actor_recipe, critic_recipe = run.recipe(settings.actor), run.recipe(settings.critic)
    actor_recipe.check(actor_name, AutoModelForCausalLM.from_config)
    critic_recipe.check(critic_name, RewardModel.from_config)
    actor_plan = run.save_plan(actor_name, actor_recipe, "actor", "actor_ema")
    critic_plan = run.save_plan(critic_name, critic_recipe, "critic")
    data = create_prompt_dataset(spec, tokenizer, 3, once=from_local_main)
    print_rank_0("\n".join(data.report.lines()))
    cache = settings.data.data_output_path
    text = settings.mixin.blocks(tokenizer, spec.max_seq_len, cache, from_local_main)
    collator, rollout_batch = PromptCollator(tokenizer.pad_token_id), config.rollout_batch_size
    ranks = {"rank": begun.rank, "world_size": begun.world_size, "seed": run.seed}
    prompts = build_loader(data.train, collator, rollout_batch, shuffle=True, **ranks)
    held_out = build_loader(data.eval, collator, rollout_batch, shuffle=False, **ranks)
    batches = prompts.batches_in(0)  # those of every epoch
    iterations = settings.iterations(batches)
    actor, critic = settings.roles(begun.dtype_name, iterations)
    for role in (actor, critic):
        get_train_ds_config(role.engine, begun.world_size)
    engines = {
        "actor": EnginePlan.of(actor.engine, actor.recipe, "actor_"),
        "critic": EnginePlan.of(critic.engine, critic.recipe, "critic_"),
    }
    course = Course.of(
        run.num_train_epochs * [batches], settings.ppo.generation_batches, iterations
    )
    found = rewards.record() | ({"unsupervised_dataset_name.rows": text.key} if text else {})
    plan = Plan.of("step 3 (PPO)", settings, begun.dtype_name, data.key, course, engines, found)
    states = TrainingStates(run.state_config(), plan, distributed)

    # 2. the roles
    ema_decay = settings.ema_decay if settings.enable_ema else None
    roles = DeepSpeedRLHFEngine.load(actor, critic, tokenizer, distributed, ema_decay)
    ptx = PTX(text, settings.mixin.unsup_coef, **ranks) if text else None
    trainer = DeepSpeedPPOTrainer(roles, config, begun.world_size, rewards, ptx)
    recipes = actor.recipe, critic.recipe
    log_config = run.log_config(states.continued)
    log = PPOLog(
        log_config, settings.printing(), roles, recipes, begun.gpus, iterations, begun.rank
    )
    set_random_seed(run.seed + begun.rank)
    at = states.restore(
        {"actor": roles.actor, "critic": roles.critic},
        {"ppo": trainer, "ema": roles.ema, "ptx": ptx, "health": log.health},
        frozen={"reference": roles.reference, "reward": roles.reward},
    )

    # 3. train; evaluate before, at intervals, after each epoch
    iteration = at.step
    if iteration == 0:
        log.evaluation(iteration, trainer.evaluate(held_out))
    for epoch in range(at.epoch, course.epochs):
        prompts.set_epoch(epoch, skip=at.batches(epoch))
        for batches in windows(prompts, settings.ppo.generation_batches):
            if iteration == iterations:
                break
            log.begin()
            experiences = [trainer.rollout(batch) for batch in batches]
            log.rolled_out()
            statistics = trainer.train_rlhf(experiences)
            iteration += 1
            log.iteration(iteration, statistics, experiences, config.ppo_epochs)
            if settings.ppo.eval_interval and iteration % settings.ppo.eval_interval == 0:
                log.evaluation(iteration, trainer.evaluate(held_out))
            states.save_if_due(iteration, epoch)
        log.evaluation(iteration, trainer.evaluate(held_out))
        if iteration == iterations:
            break

    # 4. model folders that transformers loads
    if run.output_dir is not None:
        output = Path(run.output_dir)
        save_hf_format(roles.actor, tokenizer, output / "actor", distributed, actor_plan)
        save_hf_format(roles.critic, tokenizer, output / "critic", distributed, critic_plan)
        if roles.ema is not None:
            with roles.ema.applied() as averaged:
                save_hf_format(averaged, tokenizer, output / "actor_ema", distributed, actor_plan)
    log.close()


if __name__ == "__main__":
    run_cli(main)
