"""Proof that a reward model keeps both answers of a pair apart where they stand in one row."""

from __future__ import annotations

import torch
from torch import nn

from dschat.errors import UserError
from dschat.models.attention import is_flash
from dschat.models.causal_lm import eval_mode, unwrap
from dschat.models.config import load_config
from dschat.models.packing import TOLERANCE, obstacle
from dschat.models.reward_model import trunk_class
from dschat.models.shared_prompt import CHOSEN, PROMPT, REJECTED

_APART = "drop share_prompts"


def check_shared_prompts(
    model_name_or_path: str, max_seq_len: int, attn_implementation: str | None = None
) -> None:
    """Stop when a reward model of this shape cannot keep answers apart; reads the config alone.

    Raises:
        UserError: with what the model has that a row with two answers cannot serve.
    """
    config = load_config(model_name_or_path, attn_implementation=attn_implementation)
    with torch.device("meta"):
        trunk = trunk_class(config)._from_config(config)
    problem = obstacle(trunk, trunk.config, max_seq_len)
    if problem is None and is_flash(trunk.config._attn_implementation):
        problem = "uses flash attention, which takes no mask of its own for each token"
    if problem is not None:
        raise UserError(f"share_prompts: model {model_name_or_path} {problem}; {_APART}")


@torch.no_grad()
def prove_shared_prompts(model: nn.Module, device: torch.device) -> None:
    """Check that both answers of a pair have the values that they have in rows of their own.

    It finds what the checks of the config cannot know of each architecture; two passes over a few
    tokens, on every rank.

    Raises:
        UserError: an answer sees the other one, or its positions do not go on from the prompt.
    """
    prompt, chosen, rejected = [3, 5, 4, 6, 8], [7, 9, 11, 10], [12, 7, 13, 9, 14, 10]
    rows = torch.tensor([[*prompt, *chosen, 3, 3], [*prompt, *rejected]], device=device)
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[0, -2:] = False
    tree = torch.tensor([[*prompt, *chosen, *rejected]], device=device)
    lengths = torch.tensor([len(prompt), len(chosen), len(rejected)], device=device)
    segments = torch.tensor([PROMPT, CHOSEN, REJECTED], device=device).repeat_interleave(lengths)
    places = [*range(len(prompt + chosen)), *range(len(prompt), len(prompt + rejected))]
    positions = torch.tensor([places], device=device)
    with eval_mode(model):
        apart = model(rows, mask)
        together = model(tree, segments=segments[None], position_ids=positions)[0]
    end = len(prompt + chosen)
    expected = torch.cat([apart[0, :end], apart[1, len(prompt) :]])
    difference = ((together - expected).abs().max() / expected.abs().max()).item()
    dtype = next(unwrap(model).parameters()).dtype
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"share_prompts: this model's values of an answer differ by {difference:.1%} of the "
            f"largest where another answer to the prompt stands in the same row; {_APART}"
        )
