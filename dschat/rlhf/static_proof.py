"""Proof that a model decodes on a static cache as it computes entire texts."""

from __future__ import annotations

import torch

from dschat.models.causal_lm import eval_mode, forward_inputs
from dschat.rlhf.static_model import StaticModel, obstacle

ROUNDINGS = 16  # of the largest logit, by which one pass and many may differ
STEPS = 4
TRUNCATED = 80  # characters of another library's message


def disproof(static: StaticModel, longest: int) -> str | None:
    """Describe what keeps a model from the static cache; None: it has none, and passed.

    Texts of random tokens, of several lengths after left padding and as long as a window of its
    attention where one can act, are decoded token by token, some rows being dropped on the way; the
    logits must be those of one pass. A step that cannot be recorded is left to Python.

    Args:
        longest: tokens of the longest prompt and answer.
    """
    if (reason := obstacle(static.model)) is not None:
        return reason
    with eval_mode(static.model), torch.no_grad():
        static.refresh()
        reason = _failure(static, longest)
        if reason is not None and static.records:
            static.records = False
            reason = _failure(static, longest)
    return reason


def _failure(static: StaticModel, longest: int) -> str | None:
    try:
        gap, allowed = _gap(static, longest)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the model's own code, called in a way that it need not know
        return f"{type(error).__name__}: {' '.join(str(error).split())[:TRUNCATED]}"
    if gap <= allowed:  # a NaN is no agreement
        return None
    return f"its logits differ by {gap:.2g}, rounding allows {allowed:.2g}"


def _gap(static: StaticModel, longest: int) -> tuple[float, float]:
    """Measure the largest difference of logits, and what rounding allows."""
    windows = [w for w in static.windows if w is not None and w < longest]
    width = min(max([4, *(w + 2 for w in windows)]), max(longest - STEPS, 1))
    ids, mask = _text(static, width)
    prompt = ids[:, :width], mask[:, :width]
    expected = _of_one_pass(static, ids, mask)
    cache, rows = static.cache(len(ids)), torch.arange(len(ids), device=ids.device)
    first, column = (~mask).sum(-1), torch.full_like(rows, width)
    gaps = [(static.prefill(cache, *prompt, rows, rows).float() - expected[:, 0]).abs().max()]
    for step in range(STEPS):
        if step == STEPS // 2:  # another number of rows
            kept = rows[1:]
            cache.keep(kept)
            ids, expected, first, column = (x[kept] for x in (ids, expected, first, column))
        cache.reserve(width + step + 1, width + STEPS)
        place = ids[:, width + step], column, first, width + step + 1
        gaps.append((static.step(cache, *place).float() - expected[:, step + 1]).abs().max())
        column = column + 1
    allowed = ROUNDINGS * torch.finfo(static.dtype).eps * expected.abs().max().item()
    return torch.stack(gaps).max().item(), allowed


def _text(static: StaticModel, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make three rows of random ids and their mask, (3, width + STEPS)."""
    vocabulary = static.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)  # the run's own noise stays as it is
    ids = torch.randint(vocabulary, (3, width + STEPS), generator=generator)
    lengths = torch.tensor([[width], [max(width - 2, 1)], [1]])
    mask = torch.arange(width + STEPS) >= width - lengths
    return ids.to(static.device), mask.to(static.device)


def _of_one_pass(static: StaticModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(3, STEPS + 1, V) fp32 logits after each token from the prompts' last one on."""
    inputs = forward_inputs(static.model, ids, mask)
    return static.model(**inputs, use_cache=False).logits[:, -STEPS - 1 :].float()
