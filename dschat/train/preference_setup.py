"""Preparation of a preference loss: batches of pairs, and the reference before the first step."""

from __future__ import annotations

from dschat.data.batch_config import BatchConfig
from dschat.data.batching import Loader
from dschat.data.cache import open_folder
from dschat.data.collators import PreferenceCollator
from dschat.data.datasets import PromptData
from dschat.data.mismatched import Mismatched
from dschat.data.stream import StreamLoader
from dschat.functional.preferences import PreferenceLoss
from dschat.train.preference_config import ADAPTERS_OFF, NO_REFERENCE, PreferenceConfig
from dschat.train.preferences import Objective
from dschat.train.prepare import Run
from dschat.train.reference import AdaptersOff, Reference, precompute
from dschat.train.run_context import RunContext
from dschat.utils.distributed import print_rank_0


def preference_loaders(
    ctx: RunContext, data: PromptData, loss: PreferenceLoss, config: BatchConfig
) -> tuple[Loader | StreamLoader, Loader]:
    """Build this rank's loaders of training and evaluation pairs."""
    for_training, for_evaluation = _collators(ctx, data, loss, config)
    training = ctx.loader(data.train, for_training, config.sampler(sequences=2), shuffle=True)
    rows = config.per_device_eval_batch_size
    evaluation = ctx.loader(data.eval, for_evaluation, rows, shuffle=False)
    assert isinstance(evaluation, Loader)
    return training, evaluation


def prepare_objective(run: Run, data: PromptData, config: PreferenceConfig) -> Objective:
    """Put loss and reference together; print which reference it is.

    To be called before a checkpoint is restored: the engine still holds what training starts from.
    """
    return Objective(config.loss, config.coefficients, _prepare_reference(run, data, config))


def _prepare_reference(run: Run, data: PromptData, config: PreferenceConfig) -> Reference:
    choice, loss = config.choose_reference(run.model.config), config.loss
    if choice == NO_REFERENCE:
        print_rank_0(f"reference: none, {loss.name} has none")
        return Reference()
    if choice == ADAPTERS_OFF:
        print_rank_0("reference: the model with its adapters off, a forward pass of every batch")
        return AdaptersOff()
    settings, ctx = run.settings, run.ctx
    loaders, rows = [], settings.batch.per_device_eval_batch_size
    collators = _collators(ctx, data, loss, settings.batch)
    for part, collator in zip((data.train, data.eval), collators, strict=True):
        loader = ctx.loader(part, collator, rows, shuffle=False)
        assert isinstance(loader, Loader), "a stream has no reference to look up"
        loaders.append(loader)
    columns = 3 if loss.needs_kl else 2
    root = open_folder(settings.data.data_output_path)
    return precompute(run.engine, loaders, ctx, (root, data.key), columns)


def _collators(
    ctx: RunContext, data: PromptData, loss: PreferenceLoss, config: BatchConfig
) -> tuple[PreferenceCollator, PreferenceCollator]:
    """Of training and evaluation pairs, which are numbered after those of training."""
    tokenizer, collators, first = ctx.tokenizer, [], 0
    for rows in (data.train, data.eval):
        mismatched = None
        if loss.needs_kl:
            mismatched = Mismatched(rows, config.max_seq_len, tokenizer.bos_token_id)
        collators.append(PreferenceCollator(tokenizer.pad_token_id, first, mismatched))
        first += data.report.train_rows or 0
    return collators[0], collators[1]
