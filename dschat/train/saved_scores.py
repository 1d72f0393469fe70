"""A reward model is saved, read back as users will read it, and scores a pair as in training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from dschat.data.batches import PairBatch
from dschat.data.collators import PairCollator
from dschat.data.datasets import PromptData
from dschat.errors import UserError, brief
from dschat.models.causal_lm import unwrap
from dschat.models.reward_folder import RewardForm, reward_form
from dschat.models.reward_model import RewardModel, create_critic_model, scores_at_end
from dschat.models.save import save_hf_format
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train.evaluation import report_pairs, scores_summary
from dschat.train.pair_plot import report_files
from dschat.train.pair_report import ScoredPairs
from dschat.train.prepare import Run
from dschat.utils.distributed import print_rank_0
from dschat.utils.waiting import from_waiting_main

# What rounding may do, that of merged weights and of another device's products too: shares of the
# scores' spread and of their size. Another position, head or weight moves them by the spread.
ROUNDING = {torch.float32: (0.01, 1e-3), torch.bfloat16: (0.25, 0.02), torch.float16: (0.25, 0.02)}


def save_reward_model(
    run: Run, data: PromptData, scored: ScoredPairs, flags: Mapping[str, Any]
) -> None:
    """Write the trained reward model, its statistics and a report on its evaluation; read it back.

    Args:
        scored: the evaluation set in its order. flags: those that repeat this evaluation.

    Raises:
        UserError: scores that are not finite, or that the saved model does not give.
    """
    ctx, engine, output = run.ctx, run.engine, run.config.output_dir
    statistics = scores_summary(scored.figures(), len(data.eval), data.key)
    files = report_files(report_pairs(scored, data.eval, data.report), flags, ctx.rank)
    save_hf_format(engine, ctx.tokenizer, output, ctx, run.model.save, statistics, files)
    first = list(data.eval.select(range(min(2, len(data.eval)))))
    check_saved_scores(engine, output, PairCollator(ctx.tokenizer.pad_token_id)(first), scored)


def check_saved_scores(
    model: nn.Module, output_dir: str | Path, pairs: PairBatch, scored: ScoredPairs
) -> None:
    """Load the saved folder on rank 0's CPU and compare the scores of held-out pairs.

    The class of transformers that the folder is for scores them where it has one, padding included;
    else this project's reader does. A model for whose weights the host has no room is left out, and
    a line says so.

    Args:
        model: the trained reward model, or an engine around it.
        output_dir: where it was saved.
        pairs: the first ones of the evaluation set, padded on the right.
        scored: that set's scores in training.

    Raises:
        UserError: on every rank, where a score differs by more than rounding.
    """
    folder, count = Path(output_dir), len(pairs.real)
    module = unwrap(model)
    if not isinstance(module, RewardModel) or not len(scored):
        return
    expected = torch.cat([scored.chosen[:count], scored.rejected[:count]])
    spread = torch.cat([scored.chosen, scored.rejected]).std().item()
    of_spread, of_size = ROUNDING[module.v_head.weight.dtype]
    allowed = of_spread * spread + of_size * (1 + expected.abs().max().item())

    def check() -> str:
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if 2 * size > psutil.virtual_memory().available:
            print_rank_0(f"{folder} was not read back: its weights take {size / 2**30:.1f} GiB")
            return ""
        try:
            found = _read_back(folder, module, pairs)
        except Exception as error:  # of the model's own code
            problem = brief(error, with_type=True)
            raise UserError(
                f"output_dir {folder}: the saved model is not read: {problem}"
            ) from error
        gap = (found - expected).abs().max().item()
        if not gap <= allowed:  # a NaN is no agreement
            raise UserError(
                f"output_dir {folder}: read back, the saved reward model scores held-out pairs "
                f"otherwise than in training, by up to {gap:.3g} (rounding allows {allowed:.2g}); "
                "do not use these files: the last checkpoint has the weights"
            )
        return ""

    from_waiting_main(check)


@torch.no_grad()
def _read_back(folder: Path, module: RewardModel, pairs: PairBatch) -> torch.Tensor:
    """(2B,) float64 scores by the folder: of the chosen, then of the rejected answers."""
    tokenizer = load_hf_tokenizer(str(folder))
    form, ids = reward_form(module.config, tokenizer), pairs.input_ids.cpu()
    mask = pairs.attention_mask.cpu()
    if form.has_head and (folder / "config.json").is_file():
        return _by_transformers(folder, form, ids, mask)
    reader = create_critic_model(str(folder), tokenizer, module.v_head.weight.dtype).eval()
    return scores_at_end(reader(ids, mask), mask).double()


def _by_transformers(
    folder: Path, form: RewardForm, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Score by the class that the folder names, with its own padding."""
    classifier = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype="auto", trust_remote_code=False
    ).eval()
    pad = form.config.get_text_config().pad_token_id
    if pad is None:  # it takes one text at a time
        alone = [row[seen][None] for row, seen in zip(ids, mask, strict=True)]
        return torch.cat([classifier(input_ids=row).logits[:, 0] for row in alone]).double()
    ids = ids.masked_fill(~mask, pad)
    return classifier(input_ids=ids, attention_mask=mask).logits[:, 0].double()
