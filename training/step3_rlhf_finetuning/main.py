"""Step 3, PPO: sample answers, score them, move the policy towards what scores well.

Each iteration: roll out `--generation_batches` batches of prompts, then train actor and critic on
them for `--ppo_epochs` passes. With `--actor_lora_dim` the reference is the actor with its adapters
off; with `--critic_lora_dim` the reward model is the critic's trunk with its adapters off: two
trunks on the device instead of four, or one with `--share_trunk all`. Writes OUTPUT/actor,
OUTPUT/critic where one is trained and, with `--enable_ema`, OUTPUT/actor_ema.

    deepspeed main.py --actor_model_name_or_path ./sft \\
        --critic_model_name_or_path ./reward --actor_zero_stage 2
    dschat ppo --config settings.yaml --actor_lora_dim 16
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from dschat.train import signals

    signals.start()

    from dschat.config import RLHFSettings
    from dschat.config.cli import check_flags

    check_flags(RLHFSettings, __doc__)

from dschat.config import RLHFSettings
from dschat.config.cli import parse, run_cli
from dschat.config.unused import tell_unused
from dschat.data.collators import PromptCollator
from dschat.plan.start import tell_plan
from dschat.rlhf.prepare import plan_roles, prepare
from dschat.train.run_context import setup_run
from dschat.train.steps import accumulation_groups, with_next


def main(settings: RLHFSettings | None = None) -> None:
    """Check, load, train, save; settings come from the command line where none are given."""
    settings = settings or parse(RLHFSettings, None, __doc__)
    config = settings.ppo
    tell_unused(settings)

    # 1. check everything that can be wrong before weights are loaded
    name = settings.roles.actor_model_name_or_path
    ctx = setup_run(name, settings.run, settings.data.prompt_format)
    plan = plan_roles(ctx, settings)
    tell_plan(ctx, settings)
    source, later = plan.rewards.reading(settings.data), plan.training.later
    lengths = settings.max_seq_len, settings.max_prompt_seq_len
    data = ctx.load_data(source, settings.PHASE, *lengths, later=later)

    # 2. prompts, roles
    collator = PromptCollator(ctx.tokenizer.pad_token_id)
    batch_size = config.per_device_generation_batch_size
    prompts = ctx.loader(data.train, collator, batch_size, shuffle=True)
    held_out = ctx.loader(data.eval, collator, batch_size, shuffle=False)
    run = prepare(ctx, settings, plan, data, prompts)
    trainer, iterations = run.trainer, run.steps.total_steps
    log, position = run.start()

    # 3. train; evaluate before, at intervals, after each epoch
    iteration = position.step
    if iteration == 0:
        log.evaluation(iteration, *trainer.evaluated(held_out))
    for epoch in range(position.epoch, run.steps.epochs):
        in_order = prompts.batches(epoch, skip=position.batches(epoch))
        groups = accumulation_groups(in_order, run.steps.batches_per_step)
        for batches, following in with_next(groups, is_wanted=config.rollouts_ahead > 0):
            if iteration == iterations:
                break
            log.begin()
            # The stages of ppo_trainer.py: sample and score answers (and begin the next ones),
            coming = following if iteration + 1 < iterations else None
            rollouts = trainer.rollout(batches, coming=coming)
            # with dynamic sampling, have others take the place of those that teach nothing,
            resampled = trainer.resampled(rollouts)
            log.rolled_out()
            # turn rewards into advantages,
            experiences, statistics = trainer.advantages(rollouts, resampled.trained)
            statistics |= resampled.statistics
            # make the optimizer steps of actor and critic, and steer the KL penalty.
            statistics |= trainer.update(experiences)
            trainer.control_kl(statistics["kl"], rollouts)
            iteration += 1
            trained = resampled.trained
            log.iteration(iteration, statistics, resampled.drawn, config.ppo_epochs, trained)
            if run.steps.is_evaluated_between(iteration, settings.eval_interval):
                log.evaluation(iteration, *trainer.evaluated(held_out))
            run.checkpointer.save_if_due(iteration, epoch)
        log.evaluation(iteration, *trainer.evaluated(held_out))
        if iteration == iterations:
            break

    # 4. model folders that transformers loads
    run.save()
    run.end(log)


if __name__ == "__main__":
    run_cli(main)
