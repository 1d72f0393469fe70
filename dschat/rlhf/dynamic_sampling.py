"""Dynamic sampling: prompts whose answers are all worth the same give way to further prompts.

Such a group has no advantages and teaches nothing (DAPO, arXiv:2503.14476, section 3.2). Further
prompts are drawn for at most some rounds; the shapes of an iteration, and so its optimizer steps,
stay as they are. Groups that no other could take the place of stay too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from dschat.data.batches import PromptBatch
from dschat.data.batching import Loader
from dschat.data.collators import PromptCollator
from dschat.data.datasets import PromptData
from dschat.data.stream import StreamLoader
from dschat.rlhf.experience import Experience, filled, stacked
from dschat.rlhf.micro_batches import RowLengths
from dschat.rlhf.ppo_config import PPOConfig
from dschat.train.run_context import RunContext
from dschat.utils.distributed import all_reduce_max, all_reduce_sum

BEYOND = 2**31  # epochs of a run; those of spare prompts come after it, in orders of their own


class SparePrompts:
    """Endless batches of this rank's training prompts, as many on every rank.

    Args:
        loader: one of its own.
    """

    per_rank = False  # all ranks have drawn as many

    def __init__(self, loader: Loader | StreamLoader):
        if isinstance(loader, StreamLoader):
            raise ValueError("a stream cannot be read from two places")
        self.loader, self.drawn = loader, 0
        self._batches: Iterator[PromptBatch] = iter(())

    @classmethod
    def of(cls, ctx: RunContext, config: PPOConfig, data: PromptData) -> SparePrompts:
        """Open a run's training prompts once more."""
        collator = PromptCollator(ctx.tokenizer.pad_token_id)
        size = config.per_device_generation_batch_size
        return cls(ctx.loader(data.train, collator, size, shuffle=True))

    def take(self, count: int) -> list[PromptBatch]:
        """Draw the next batches."""
        taken = []
        for _ in range(count):
            batch = next(self._batches, None)
            if batch is None:  # an epoch ends, or the first draw after a start
                batch = next(self._reopened())
            taken.append(batch)
            self.drawn += 1
        return taken

    def _reopened(self) -> Iterator[PromptBatch]:
        epoch, skip = divmod(self.drawn, self.loader.batches_in(0))
        self._batches = self.loader.batches(BEYOND + epoch, skip=skip)
        return self._batches

    def state_dict(self) -> dict[str, int]:
        """Number of batches drawn."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after as many batches."""
        self.drawn, self._batches = state["drawn"], iter(())


@dataclass(frozen=True)
class Resampled:
    """An iteration after dynamic sampling.

    Attributes:
        trained: the experiences to learn from, shaped as the first ones.
        drawn: all that were sampled.
    """

    trained: list[Experience]
    drawn: list[Experience]
    statistics: dict[str, float]


def resampled(
    rollouts: list[Experience],
    spare: SparePrompts,
    roll_out: Callable[[list[PromptBatch]], list[Experience]],
    config: PPOConfig,
    pad_token_id: int,
) -> Resampled:
    """Replace groups without spread by those of further prompts; every rank calls it as often.

    Args:
        rollouts: with rewards. roll_out: samples, scores and rewards batches of prompts.
    """
    size, penalty = config.answers_per_prompt, config.missing_eos_penalty
    vacant = [row for row, spread in _groups(rollouts, size, penalty) if not spread]
    (prompts,) = all_reduce_sum([float(sum(e.real.sum().item() for e in rollouts)) / size])
    drawn, found, rounds = list(rollouts), list[int](), 0
    while rounds < config.policy.dynamic_sampling_rounds:
        (missing,) = all_reduce_max([float(max(len(vacant) - len(found), 0))])
        if not missing:
            break
        rows = sum(len(e) for e in drawn)
        more = roll_out(spare.take(-(-int(missing) // config.per_device_generation_batch_size)))
        found += [rows + row for row, spread in _groups(more, size, penalty) if spread]
        drawn, rounds = [*drawn, *more], rounds + 1
    filled_up, left = all_reduce_sum(
        [float(min(len(vacant), len(found))), float(max(len(vacant) - len(found), 0))]
    )
    statistics = {
        "resampling_rounds": float(rounds),
        "resampled": filled_up / max(prompts, 1.0),
        "frac_zero_std_drawn": (filled_up + left) / max(prompts, 1.0),
    }
    pairs = list(zip(vacant, found, strict=False))
    trained = _exchanged(rollouts, drawn, pairs, size, pad_token_id) if pairs else rollouts
    return Resampled(trained, drawn, statistics)


def _exchanged(
    rollouts: list[Experience],
    drawn: list[Experience],
    pairs: list[tuple[int, int]],
    size: int,
    pad_token_id: int,
) -> list[Experience]:
    """Put groups of `size` rows in the place of others; numbers of rows and of groups stay.

    Args:
        drawn: the rollouts and more. pairs: first rows of a group and of what takes its place.
    """
    everything = stacked(drawn, pad_token_id)
    sizes = [len(e) for e in rollouts]
    index = torch.arange(sum(sizes))
    for vacant, found in pairs:
        index[vacant : vacant + size] = torch.arange(found, found + size)
    group = everything.group[: len(index)].split(sizes)
    lengths = RowLengths.of(everything.attention_mask, everything.prompt_length, everything.real)
    return [
        replace(everything.micro_batch(lengths.micro_batch(rows)), group=numbers)
        for rows, numbers in zip(index.split(sizes), group, strict=True)
    ]


def _groups(
    experiences: list[Experience], size: int, missing_eos_penalty: float
) -> Iterator[tuple[int, bool]]:
    """Yield the first row of each real group, counted over all experiences, and if it has spread.

    The answers to one prompt lie side by side.
    """
    start = 0
    for e in experiences:
        rewards = (filled(e.rewards) - missing_eos_penalty * ~e.ended).view(-1, size)
        counted, real = e.counted.view(-1, size), e.real.view(-1, size)[:, 0]
        low = rewards.where(counted, torch.inf).amin(-1)
        high = rewards.where(counted, -torch.inf).amax(-1)
        for number, spread in enumerate((low < high).tolist()):
            if real[number]:
                yield start + number * size, spread
        start += len(e)
