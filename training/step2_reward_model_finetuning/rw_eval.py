"""Evaluate a reward model: the figures of its training, those of other pairs, scores of answers.

Without `--data_path` the evaluation at the end of training is repeated, by the settings that lie
in the model's folder. `--all_rows` scores every row of a set that nothing was trained on, such as
a benchmark's (`prompt, chosen, rejected, subset`).

    python rw_eval.py --model_name_or_path ./output
    python rw_eval.py --model_name_or_path ./output --data_path ./bench.jsonl --all_rows
    python rw_eval.py --model_name_or_path ./output --stdin < answers.jsonl
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from dschat.config.cli import check_flags
    from dschat.config.programs import RewardEvaluation

    check_flags(RewardEvaluation, __doc__)

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from dschat.config.cli import parse, run_cli
from dschat.config.programs import RewardEvaluation
from dschat.config.steps import EVALUATION_DATA
from dschat.config.unused import tell_unused
from dschat.data.batches import Row
from dschat.data.batching import build_loader
from dschat.data.collators import PairCollator, PreferenceCollator, without_end
from dschat.data.datasets import PromptData, create_prompt_dataset
from dschat.data.tokenise import Converter
from dschat.errors import UserError
from dschat.models.causal_lm import check_model_folder
from dschat.models.padding_proof import prove_padding
from dschat.models.reward_head import check_reward_head
from dschat.models.reward_model import RewardModel, create_critic_model
from dschat.models.reward_statistics import EVALUATION_FILE, read_evaluation
from dschat.models.save import check_output_dir
from dschat.text.formats import choose_format
from dschat.train.answer_scores import LineScorer
from dschat.train.evaluation import pair_scores, report_pairs, score_pairs
from dschat.train.metrics import format_value
from dschat.train.pair_plot import report_files
from dschat.train.run_context import RunContext, setup_run
from dschat.utils.distributed import print_rank_0


def recorded(given: Mapping[str, Any]) -> dict[str, Any]:
    """Give the settings by which the model was evaluated in training; of other data, the precision.

    Raises:
        UserError: they name a function, which no file may have run.
    """
    if "model_name_or_path" not in given:
        return {}
    report = read_evaluation(given["model_name_or_path"])
    if report is None:
        return {}
    settings = report["settings"]
    if given.get("all_rows") and "data_path" not in given:
        raise UserError(
            "all_rows: without data_path these are the rows of training, most of which the model "
            "was trained on; give data_path, or drop all_rows"
        )
    if "data_path" in given or given.get("stdin"):
        settings = {name: settings[name] for name in ("dtype",) if name in settings}
    if "dataset_function" in settings and "dataset_function" not in given:
        raise UserError(
            f"{EVALUATION_FILE}: its rows were read by dataset_function "
            f"{settings['dataset_function']}, which runs only where you give it: add "
            "--dataset_function, or other rows by --data_path"
        )
    known = {*EVALUATION_DATA, "data_path", "max_seq_len", "batch_size", "seed", "dtype"}
    taken = {name: value for name, value in settings.items() if name in known and name not in given}
    shown = ", ".join(f"{name} {json.dumps(value)}" for name, value in taken.items())
    if taken:
        print(f"as in training: {shown}", file=sys.stderr if given.get("stdin") else sys.stdout)
    return taken


def main() -> None:
    """Score the evaluation pairs of the data, or lines of standard input."""
    settings = parse(RewardEvaluation, None, __doc__, recorded)
    if settings.stdin:
        output = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):  # scores alone are printed
            scorer = line_scorer(settings, start(settings))
            for line in scorer(sys.stdin):
                print(line, file=output, flush=True)
        return
    ctx = start(settings)
    data = create_prompt_dataset(
        settings.rows, ctx.tokenizer, 2, seed=settings.seed, max_seq_len=settings.max_seq_len
    )
    rows = data.eval
    if settings.all_rows:
        rows = datasets.concatenate_datasets([data.train, data.eval])
        drawn = np.random.default_rng(settings.seed).permutation(len(rows))
        rows = rows.select(np.sort(drawn[: settings.data.max_eval_samples]))
    evaluate(settings, ctx, load(settings, ctx), data, rows)


def start(settings: RewardEvaluation) -> RunContext:
    """Check what can be checked before weights and data load."""
    tell_unused(settings)
    name = settings.model_name_or_path
    ctx = setup_run(name, settings, prompt_format=settings.data.prompt_format)
    if (
        settings.output_dir is not None
        and Path(settings.output_dir).resolve() == Path(name).resolve()
    ):
        raise UserError(f"output_dir {name}: the model's folder keeps its own report; give another")
    check_output_dir(settings.output_dir)
    check_model_folder(name, ctx.tokenizer)
    check_reward_head(name)
    return ctx


def line_scorer(settings: RewardEvaluation, ctx: RunContext) -> LineScorer:
    """Load what scores lines of standard input."""
    form, kept = choose_format(ctx.tokenizer), settings.data.keep_special_tokens
    convert = Converter(ctx.tokenizer, form, 1, settings.max_seq_len, None, kept)
    return LineScorer(load(settings, ctx), convert, ctx.device, settings.data.read)


def load(settings: RewardEvaluation, ctx: RunContext) -> RewardModel:
    """Load the reward model onto the device."""
    model = create_critic_model(settings.model_name_or_path, ctx.tokenizer, ctx.dtype)
    model = model.to(ctx.device).eval()
    prove_padding(model, ctx.tokenizer, ctx.device, settings.model_name_or_path)
    return model


def evaluate(
    settings: RewardEvaluation,
    ctx: RunContext,
    model: RewardModel,
    data: PromptData,
    rows: datasets.Dataset,
) -> None:
    """Print the figures of pairs, their tables and single scores; write the report if asked to."""
    collate = PreferenceCollator(ctx.tokenizer.pad_token_id)
    loader = build_loader(
        rows,
        (lambda batch: collate([*map(without_end, batch)])) if settings.without_end else collate,
        settings.batch_size,
        rank=0,
        world_size=1,
        seed=settings.seed,
        shuffle=False,
    )
    scored = score_pairs(model, loader, ctx.device)
    figures = scored.figures()
    print_rank_0(" | ".join(f"{name} {format_value(x)}" for name, x in figures.items()))
    report = report_pairs(scored, rows, data.report)
    if settings.output_dir is not None:
        flags = {"model_name_or_path": settings.model_name_or_path, "all_rows": settings.all_rows}
        flags |= {"data_path": settings.data.data_path, "max_seq_len": settings.max_seq_len}
        for name, content in report_files(report, flags, ctx.rank).items():
            Path(settings.output_dir, name).write_bytes(content)
    shown = list(rows.select(range(min(settings.show, len(rows)))))
    show(ctx, model, [*map(without_end, shown)] if settings.without_end else shown)


@torch.no_grad()
def show(ctx: RunContext, model: RewardModel, rows: Sequence[Row]) -> None:
    """Print pairs with their scores."""
    tokenizer = ctx.tokenizer
    collate = PairCollator(tokenizer.pad_token_id)
    for row in rows:
        chosen, rejected = pair_scores(model, collate([row]).to(ctx.device))
        prompt = tokenizer.decode(row["chosen_ids"][: row["prompt_len"]])
        print_rank_0(f"\nprompt: {prompt!r}")
        for name, score in (("chosen", chosen), ("rejected", rejected)):
            answer = tokenizer.decode(row[f"{name}_ids"][row["prompt_len"] :])
            print_rank_0(f"{name:>8} {score.item():8.3f}: {answer!r}")


if __name__ == "__main__":
    run_cli(main)
