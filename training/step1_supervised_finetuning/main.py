"""Step 1, supervised fine-tuning: teach a causal language model to answer.

The loss is the mean -log p over answer tokens (end token included) of each optimizer step, on all
ranks together. LoRA (`--lora_dim`) trains A and B at rates of ratio `--loraplus_lr_ratio` (LoRA+).

    deepspeed main.py --model_name_or_path facebook/opt-1.3b --zero_stage 2
    torchrun --nproc_per_node 2 main.py --config settings.yaml
    dschat sft --model_name_or_path ./model --data_path ./pairs.jsonl
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from dschat.train import signals

    signals.start()

    from dschat.config import SFTSettings
    from dschat.config.cli import check_flags

    check_flags(SFTSettings, __doc__)

from dschat.config import SFTSettings
from dschat.config.cli import parse, run_cli
from dschat.config.unused import tell_unused
from dschat.data.collators import PackedCollator, SFTCollator
from dschat.functional.losses import mean_scale
from dschat.models.causal_lm import create_hf_model
from dschat.models.config import build_causal_lm
from dschat.models.packing import prove_packing
from dschat.models.reward_head import check_language_model
from dschat.models.save import save_hf_format
from dschat.plan.start import tell_plan
from dschat.train.engine import backward
from dschat.train.evaluation import answer_loss, evaluate_answers, trained_tokens
from dschat.train.prepare import plan_model, prepare
from dschat.train.progress import batch_counts, finite_loss, timed
from dschat.train.run_context import setup_run
from dschat.train.steps import accumulation_groups
from dschat.train.transfer import ahead
from dschat.utils.distributed import all_reduce_sum


def main(settings: SFTSettings | None = None) -> None:
    """Check, load, train, save; settings come from the command line where none are given."""
    settings = settings or parse(SFTSettings, None, __doc__)
    batch_config = settings.batch
    tell_unused(settings)

    # 1. check everything that can be wrong before weights are loaded
    name, prompt_format = settings.model_name_or_path, settings.data.prompt_format
    ctx = setup_run(name, settings.run, prompt_format, teaches_format=True)
    check_language_model(name)
    model = plan_model(ctx, settings, build_causal_lm)
    tell_plan(ctx, settings)
    data = ctx.load_data(settings.data, settings.PHASE, batch_config.max_seq_len, later=model.later)

    # 2. batches, model, engine
    pad_token_id, on_prompt = ctx.tokenizer.pad_token_id, settings.train_on_prompt
    padded = SFTCollator(pad_token_id, on_prompt)
    collator = PackedCollator(pad_token_id, on_prompt) if settings.packing else padded
    train_loader = ctx.loader(data.train, collator, settings.sampler(), shuffle=True)
    eval_rows = batch_config.per_device_eval_batch_size
    eval_loader = ctx.loader(data.eval, padded, eval_rows, shuffle=False)
    run = prepare(ctx, settings, model, data, train_loader, create_hf_model)
    engine, steps, device = run.engine, run.steps, ctx.device
    if settings.packing:
        prove_packing(engine, device)
    log, position = run.start()

    # 3. train; evaluate before, at intervals, after each epoch
    step = position.step
    if step == 0:
        log.evaluation(step, *timed(evaluate_answers, engine, eval_loader, device))
    for epoch in range(position.epoch, steps.epochs):
        batches = train_loader.batches(epoch, skip=position.batches(epoch))
        groups = accumulation_groups(batches, steps.batches_per_step)
        for collated, micro_batches in ahead(groups, device):
            if step == steps.total_steps:
                break
            counts = all_reduce_sum(batch_counts(collated, trained_tokens))
            scale, losses = mean_scale(counts[0], ctx.world_size), []
            for i, batch in enumerate(micro_batches):
                loss = answer_loss(engine, batch)
                backward(engine, loss * scale, last=i == len(micro_batches) - 1)
                losses.append(loss.detach())
            step += 1
            loss_sum = finite_loss(step, losses, counts[0], engine.gradients)
            engine.step()
            log.step(step, loss_sum, counts)
            if settings.print_loss:
                log.print_loss(step, loss_sum, counts)
            if steps.is_evaluated_between(step, settings.eval_interval):
                log.evaluation(step, *timed(evaluate_answers, engine, eval_loader, device))
            run.checkpointer.save_if_due(step, epoch)
        log.evaluation(step, *timed(evaluate_answers, engine, eval_loader, device))
        if step == steps.total_steps:
            break

    # 4. a model folder that transformers loads
    save_hf_format(engine, ctx.tokenizer, settings.run.output_dir, ctx, model.save)
    run.end(log)


if __name__ == "__main__":
    run_cli(main)
