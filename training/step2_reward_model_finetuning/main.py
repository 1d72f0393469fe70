"""Step 2, reward model: learn which of two answers people prefer.

The score is the value at the last real token; the loss of an optimizer step is the mean over its
pairs, on all ranks together, of -log sigmoid(score(chosen) - score(rejected)). LoRA+ applies to the
trunk; the head trains in a group of its own.

    deepspeed main.py --model_name_or_path facebook/opt-350m --zero_stage 2
    dschat reward --model_name_or_path ./sft --data_path ./pairs.jsonl
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from dschat.train import signals

    signals.start()

    from dschat.config import RewardSettings
    from dschat.config.cli import check_flags

    check_flags(RewardSettings, __doc__)

from functools import partial

from dschat.config import RewardSettings
from dschat.config.cli import parse, run_cli
from dschat.config.unused import tell_unused
from dschat.data.collators import PreferenceCollator
from dschat.functional.losses import mean_scale, pairwise_loss
from dschat.models.reward_folder import tell_reward_form
from dschat.models.reward_model import RewardModel, create_critic_model
from dschat.models.shared_prompt_proof import prove_shared_prompts
from dschat.plan.start import tell_plan
from dschat.train.engine import backward
from dschat.train.evaluation import evaluate_pairs, pair_count, pair_scores, score_pairs
from dschat.train.prepare import plan_model, prepare
from dschat.train.progress import batch_counts, finite_loss, timed
from dschat.train.run_context import setup_run
from dschat.train.saved_scores import save_reward_model
from dschat.train.steps import accumulation_groups
from dschat.train.transfer import ahead
from dschat.utils.distributed import all_reduce_sum


def main(settings: RewardSettings | None = None) -> None:
    """Check, load, train, save; settings come from the command line where none are given."""
    settings = settings or parse(RewardSettings, None, __doc__)
    tell_unused(settings)

    # 1. check everything that can be wrong before weights are loaded
    name = settings.model_name_or_path
    ctx = setup_run(name, settings.run, settings.data.prompt_format)
    model = plan_model(ctx, settings, RewardModel.from_config)
    tell_plan(ctx, settings)
    tell_reward_form(name, ctx.tokenizer)
    data = ctx.load_data(
        settings.data, settings.PHASE, settings.batch.max_seq_len, later=model.later
    )

    # 2. batches, model, engine
    pad_token_id, eval_rows = ctx.tokenizer.pad_token_id, settings.batch.per_device_eval_batch_size
    collator, for_evaluation = settings.collator(pad_token_id), PreferenceCollator(pad_token_id)
    train_loader = ctx.loader(data.train, collator, settings.sampler(), shuffle=True)
    eval_loader = ctx.loader(data.eval, for_evaluation, eval_rows, shuffle=False)
    sample = ctx.sample(data.eval, settings.eval_iters, eval_rows)
    sample_loader = ctx.loader(sample, for_evaluation, eval_rows, shuffle=False)
    create = partial(create_critic_model, init_head=True)
    run = prepare(ctx, settings, model, data, train_loader, create)
    engine, steps, device = run.engine, run.steps, ctx.device
    if settings.share_prompts:
        prove_shared_prompts(engine, device)
    log, position = run.start()

    # 3. train; evaluate before, at intervals, after each epoch
    coefficients = settings.centering_coefficient, settings.label_smoothing
    step = position.step
    if step == 0:
        log.evaluation(step, *timed(evaluate_pairs, engine, eval_loader, device))
    for epoch in range(position.epoch, steps.epochs):
        batches = train_loader.batches(epoch, skip=position.batches(epoch))
        groups = accumulation_groups(batches, steps.batches_per_step)
        for collated, micro_batches in ahead(groups, device):
            if step == steps.total_steps:
                break
            counts = all_reduce_sum(batch_counts(collated, pair_count))
            scale, losses = mean_scale(counts[0], ctx.world_size), []
            for i, batch in enumerate(micro_batches):
                scores = pair_scores(engine, batch)
                loss = pairwise_loss(*scores, batch.real, batch.margin, *coefficients)
                backward(engine, loss * scale, last=i == len(micro_batches) - 1)
                losses.append(loss.detach())
            step += 1
            loss_sum = finite_loss(step, losses, counts[0], engine.gradients)
            engine.step()
            log.step(step, loss_sum, counts)
            if steps.is_evaluated_between(step, settings.eval_interval):
                log.evaluation(step, *timed(evaluate_pairs, engine, sample_loader, device))
            run.checkpointer.save_if_due(step, epoch)
        scored, seconds = timed(score_pairs, engine, eval_loader, device)
        log.evaluation(step, scored.figures(), seconds)
        if step == steps.total_steps:
            break

    # 4. a model folder that transformers loads, with the statistics that step 3 scales scores by
    save_reward_model(run, data, scored, settings.evaluation_flags(ctx.dtype_name))
    run.end(log)


if __name__ == "__main__":
    run_cli(main)
