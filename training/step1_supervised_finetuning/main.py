"""Step 1, supervised fine-tuning: teach a causal language model to answer.

The loss is the mean -log p over answer tokens (end token included) of each optimizer step, on all
ranks together. LoRA (`--lora_dim`) trains A and B at rates of ratio `--loraplus_lr_ratio` (LoRA+).

    deepspeed main.py --model_name_or_path facebook/opt-1.3b --output_dir ./output --zero_stage 2
    torchrun --nproc_per_node 2 main.py --config settings.yaml
    python main.py --model_name_or_path ./model --data_path ./pairs.jsonl --lora_dim 16
"""

from __future__ import annotations

from transformers import AutoModelForCausalLM

from dschat.config import SFTSettings
from dschat.config.cli import parse, run_cli
from dschat.data.collators import PackedCollator, SFTCollator
from dschat.data.datasets import create_prompt_dataset
from dschat.data.loaders import build_loader
from dschat.functional.losses import mean_scale
from dschat.models.causal_lm import check_context, create_hf_model
from dschat.models.packing import check_packing, prove_packing
from dschat.models.save import save_hf_format
from dschat.train.checkpointer import Checkpointer
from dschat.train.engine import accumulation_groups, backward, build_engine
from dschat.train.evaluation import answer_loss, evaluate_answers, trained_tokens
from dschat.train.metrics import MetricLogger
from dschat.train.prepare import setup_run
from dschat.train.progress import TrainingLog, batch_counts, timed
from dschat.train.resume import RunPlan, StepPlan
from dschat.utils.distributed import (
    all_reduce_sum,
    from_local_main,
    print_rank_0,
    set_random_seed,
)
from dschat.utils.ds_utils import get_train_ds_config


def main() -> None:
    """Check, load, train, save."""
    settings = parse(SFTSettings, None, __doc__)
    run, batch_sizes, model_settings = settings.run, settings.batch, settings.model
    name = settings.model_name_or_path

    # 1. everything that can be wrong is checked before weights are loaded
    ctx = setup_run(
        name,
        run,
        output_dir=run.output_dir,
        prompt_format=settings.data.prompt_format,
        teaches_format=True,
    )
    device, world_size, tokenizer = ctx.device, ctx.world_size, ctx.tokenizer
    micro_batch = batch_sizes.per_device_train_batch_size
    engine_config = run.engine_config(model_settings, ctx.dtype_name, micro_batch)
    ds_config = get_train_ds_config(engine_config, world_size)
    recipe = run.recipe(model_settings)
    recipe.check(name, AutoModelForCausalLM.from_config)
    check_context(name, batch_sizes.max_seq_len, "max_seq_len")
    if settings.packing:
        check_packing(name, batch_sizes.max_seq_len)
    save_plan = run.save_plan(name, recipe)
    lengths = {"seed": run.seed, "max_seq_len": batch_sizes.max_seq_len}
    data = create_prompt_dataset(settings.data, tokenizer, 1, once=from_local_main, **lengths)
    print_rank_0("\n".join(data.report.lines()))

    # 2. data, model, engine
    collators = [SFTCollator, PackedCollator if settings.packing else SFTCollator]
    padded, collator = (c(tokenizer.pad_token_id, settings.train_on_prompt) for c in collators)
    ranks = {"rank": ctx.rank, "world_size": world_size, "seed": run.seed}
    train_loader = build_loader(data.train, collator, settings.sampler(), shuffle=True, **ranks)
    eval_batch = batch_sizes.per_device_eval_batch_size
    eval_loader = build_loader(data.eval, padded, eval_batch, shuffle=False, **ranks)
    batches_per_step = run.engine.gradient_accumulation_steps
    batches = [train_loader.batches_in(epoch) for epoch in range(run.num_train_epochs)]
    steps = StepPlan.of(batches, batches_per_step, settings.max_steps)
    total_steps = steps.total_steps
    optimizers = {"model": recipe.optimizer}
    plan = RunPlan("step 1 (SFT)", settings, optimizers, ctx.dtype_name, data.key, steps)
    checkpointer = Checkpointer(run.checkpoint, run.output_dir, plan, ctx.distributed)
    model = create_hf_model(
        name, tokenizer, ctx.dtype, ds_config=ds_config, dropout=model_settings.dropout
    )
    schedule = run.schedule(total_steps)
    engine = build_engine(model, engine_config, recipe, schedule, world_size, "step 1, SFT")
    if settings.packing:
        prove_packing(engine, device)
    metrics = MetricLogger(run.log, run.output_dir, ctx.rank, checkpointer.continued)
    log = TrainingLog(metrics, engine, recipe, ctx.gpus, total_steps)
    set_random_seed(run.seed + ctx.rank)
    position = checkpointer.restore({"model": engine}, {"log": log})

    # 3. train; evaluate before, at intervals, after each epoch
    step = position.step
    if step == 0:
        log.evaluation(step, *timed(evaluate_answers, engine, eval_loader, device))
    for epoch in range(position.epoch, steps.epochs):
        train_loader.set_epoch(epoch, skip=position.batches(epoch))
        for micro_batches in accumulation_groups(train_loader, batches_per_step):
            if step == total_steps:
                break
            micro_batches = [batch.to(device) for batch in micro_batches]
            counts = all_reduce_sum(batch_counts(micro_batches, trained_tokens))
            scale, loss_sum = mean_scale(counts[0], world_size), 0.0
            for i, batch in enumerate(micro_batches):
                loss = answer_loss(engine, batch)
                backward(engine, loss * scale, last=i == len(micro_batches) - 1)
                loss_sum += loss.item()
            engine.step()
            step += 1
            log.step(step, loss_sum, counts)
            if settings.print_loss:
                mean = all_reduce_sum([loss_sum])[0] / max(counts[0], 1.0)
                print_rank_0(f"step {step}/{total_steps} | loss {mean:.4f}")
            if settings.eval_interval and step % settings.eval_interval == 0:
                log.evaluation(step, *timed(evaluate_answers, engine, eval_loader, device))
            checkpointer.save_if_due(step, epoch)
        log.evaluation(step, *timed(evaluate_answers, engine, eval_loader, device))
        if step == total_steps:
            break

    # 4. a model folder that transformers loads
    if run.output_dir is not None:
        save_hf_format(engine, tokenizer, run.output_dir, ctx.distributed, save_plan)
    log.close()


if __name__ == "__main__":
    run_cli(main)
