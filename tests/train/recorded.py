"""One optimizer step of each program, and what it allocates; the list of it is `recorded.json`.

    python -m tests.train.recorded     write the list anew, to be read in the diff

Two layers of width 32 at a vocabulary of 16,384: what reaches 1 MiB are embedding and head, and
what has a column for each token of the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dschat.data.collators import PackedCollator, PairCollator, SFTCollator
from dschat.functional.losses import pairwise_loss
from dschat.models.logprobs import answer_logprobs
from dschat.models.reward_model import RewardModel
from dschat.rlhf.rollout import answer_values
from dschat.train.evaluation import answer_loss, pair_scores
from dschat.train.pair_logprobs import pair_logprobs
from dschat.train.reference import as_base
from tests.helpers.recorder import Recorder
from tests.helpers.tiny import PAD, adapted, tiny_llama

LIST = Path(__file__).with_suffix(".json")
COLLECTIVES = "collectives of two ranks"  # written by test_recorded.write_collectives
VOCABULARY, LENGTH, ROWS = 16_384, 64, 4


def causal() -> nn.Module:
    """A language model whose adapters train."""
    return adapted(tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=2 * LENGTH))


def critic() -> nn.Module:
    """A reward model or critic whose adapters and head train."""
    trunk = tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=2 * LENGTH).model
    model = adapted(RewardModel(trunk))
    model.v_head.requires_grad_(True)
    return model


def ids(rows: int) -> torch.Tensor:
    """(rows, LENGTH) of random tokens."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (rows, LENGTH), generator=draw)


def sft_rows() -> list[dict]:
    """Rows whose last half trains; each one token shorter than the one before it."""
    return [
        {"input_ids": row[: LENGTH - i], "trained": [LENGTH // 2, LENGTH - i], "length": LENGTH - i}
        for i, row in enumerate(ids(ROWS).tolist())
    ]


def pairs() -> list[dict]:
    """Pairs with a common prompt of half their length."""
    sides = ids(2 * ROWS).tolist()
    return [
        {"chosen_ids": a, "rejected_ids": b[:-i], "prompt_len": LENGTH // 2}
        for i, (a, b) in enumerate(zip(sides[::2], sides[1::2], strict=True), 1)
    ]


def sft() -> Callable[[], None]:
    model, batch = causal(), SFTCollator(PAD)(sft_rows())
    return lambda: answer_loss(model, batch).backward()


def sft_packed() -> Callable[[], None]:
    rows = sft_rows()
    model, batch = causal(), PackedCollator(PAD)([rows[:2], rows[2:]])
    return lambda: answer_loss(model, batch).backward()


def sft_evaluation() -> Callable[[], None]:
    model, batch = causal(), SFTCollator(PAD)(sft_rows())
    return torch.no_grad()(lambda: answer_loss(model, batch))


def reward_model() -> Callable[[], None]:
    model, batch = critic(), PairCollator(PAD)(pairs())
    return lambda: pairwise_loss(*pair_scores(model, batch), batch.real).backward()


def dpo() -> Callable[[], None]:
    model, batch = causal(), PairCollator(PAD)(pairs())

    def step() -> None:
        with torch.no_grad(), as_base(model):
            before = pair_logprobs(model, batch)
        chosen, rejected = pair_logprobs(model, batch)
        (chosen - rejected - before[0] + before[1]).neg().sum().backward()

    return step


def ppo_scoring() -> Callable[[], None]:
    actor, values = causal(), critic()
    sequences = ids(ROWS)
    mask = torch.ones_like(sequences, dtype=torch.bool)

    @torch.no_grad()
    def step() -> None:
        answer_logprobs(actor, sequences, mask, LENGTH // 2)
        with as_base(actor):
            answer_logprobs(actor, sequences, mask, LENGTH // 2)
        answer_values(values, sequences, mask, LENGTH // 2)

    return step


def ppo_training() -> Callable[[], None]:
    actor, values = causal(), critic()
    sequences = ids(ROWS)
    mask = torch.ones_like(sequences, dtype=torch.bool)

    def step() -> None:
        found = answer_logprobs(actor, sequences, mask, LENGTH // 2, with_entropy=True)
        found.logprobs.exp().sum().backward()
        answer_values(values, sequences, mask, LENGTH // 2).square().sum().backward()

    return step


PROGRAMS = {
    "SFT": sft,
    "SFT, packed": sft_packed,
    "SFT, evaluation": sft_evaluation,
    "reward model": reward_model,
    "DPO": dpo,
    "PPO, scoring": ppo_scoring,
    "PPO, training": ppo_training,
}


def recorded(name: str) -> dict[str, int]:
    """Allocations of 1 MiB or more in the second step of a program, by dtype and shape."""
    torch.manual_seed(0)
    step = PROGRAMS[name]()
    step()  # in which the model's proofs run
    with Recorder() as recorder:
        step()
    found = recorder.allocations
    return {
        f"{dtype} {'x'.join(map(str, shape))}": found[dtype, shape]
        for dtype, shape in sorted(found)
    }


if __name__ == "__main__":
    listed = json.loads(LIST.read_text()) if LIST.exists() else {}
    listed |= {name: recorded(name) for name in PROGRAMS}
    LIST.write_text(json.dumps(listed, indent=2) + "\n")
