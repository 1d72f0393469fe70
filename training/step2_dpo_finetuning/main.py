"""Step 2, DPO: learn from preferences without a reward model, by the policy's own probabilities.

The loss of an optimizer step is the mean over its pairs, on all ranks together, of
-log sigmoid(beta (ratio(chosen) - ratio(rejected))), ratio the log-probability of an answer less
that of the reference; `--loss_type` has its kin. The reference is the model with its adapters off,
or log-probabilities computed before training: there is no second model.

    deepspeed main.py --model_name_or_path ./sft --zero_stage 2
    dschat dpo --model_name_or_path ./sft --data_path ./pairs.jsonl
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from dschat.train import signals

    signals.start()

    from dschat.config import DPOSettings
    from dschat.config.cli import check_flags

    check_flags(DPOSettings, __doc__)

from functools import partial

from dschat.config import DPOSettings
from dschat.config.cli import parse, run_cli
from dschat.config.unused import tell_unused
from dschat.functional.losses import mean_scale
from dschat.models.causal_lm import create_hf_model
from dschat.models.config import build_causal_lm
from dschat.models.reward_head import check_language_model
from dschat.models.save import save_hf_format
from dschat.plan.start import tell_plan
from dschat.train.engine import backward
from dschat.train.evaluation import pair_count
from dschat.train.means import Means
from dschat.train.preference_setup import preference_loaders, prepare_objective
from dschat.train.preferences import FallWatch, evaluate_preferences
from dschat.train.prepare import plan_model, prepare
from dschat.train.progress import batch_counts, finite_loss, timed
from dschat.train.run_context import setup_run
from dschat.train.steps import accumulation_groups
from dschat.train.transfer import ahead
from dschat.utils.distributed import all_reduce_sum


def main(settings: DPOSettings | None = None) -> None:
    """Check, load, train, save; settings come from the command line where none are given."""
    settings = settings or parse(DPOSettings, None, __doc__)
    tell_unused(settings)

    # 1. check everything that can be wrong before weights are loaded
    name = settings.model_name_or_path
    ctx = setup_run(name, settings.run, settings.data.prompt_format)
    check_language_model(name)
    model = plan_model(ctx, settings, build_causal_lm)
    tell_plan(ctx, settings)
    data = ctx.load_data(
        settings.data, settings.PHASE, settings.batch.max_seq_len, later=model.later
    )

    # 2. batches, model, engine, reference
    batch_config, preference = settings.batch, settings.preference
    train_loader, eval_loader = preference_loaders(ctx, data, preference.loss, batch_config)
    run = prepare(ctx, settings, model, data, train_loader, create_hf_model)
    engine, steps, device = run.engine, run.steps, ctx.device
    objective = prepare_objective(run, data, preference)
    evaluate = partial(evaluate_preferences, engine, eval_loader, device, objective)
    log, position = run.start(FallWatch(preference.loss), reference=objective.reference)

    # 3. train; evaluate before, at intervals, after each epoch
    step = position.step
    if step == 0:
        log.evaluation(step, *timed(evaluate))
    for epoch in range(position.epoch, steps.epochs):
        batches = train_loader.batches(epoch, skip=position.batches(epoch))
        groups = accumulation_groups(batches, steps.batches_per_step)
        for collated, micro_batches in ahead(groups, device):
            if step == steps.total_steps:
                break
            counts = all_reduce_sum(batch_counts(collated, pair_count))
            scale, losses, figures = mean_scale(counts[0], ctx.world_size), [], Means()
            distance = objective.distance(engine, micro_batches)
            for i, batch in enumerate(micro_batches):
                loss, of_batch = objective(engine, batch, distance)
                backward(engine, loss * scale, last=i == len(micro_batches) - 1)
                losses.append(loss.detach())
                figures.add(of_batch)
            step += 1
            loss_sum = finite_loss(step, losses, counts[0], engine.gradients)
            engine.step()
            log.step(step, loss_sum, counts, figures.over_ranks())
            if settings.print_loss:
                log.print_loss(step, loss_sum, counts)
            if steps.is_evaluated_between(step, settings.eval_interval):
                log.evaluation(step, *timed(evaluate))
            run.checkpointer.save_if_due(step, epoch)
        log.evaluation(step, *timed(evaluate))
        if step == steps.total_steps:
            break

    # 4. a model folder that transformers loads
    save_hf_format(engine, ctx.tokenizer, settings.run.output_dir, ctx, model.save)
    run.end(log)


if __name__ == "__main__":
    run_cli(main)
