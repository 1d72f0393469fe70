"""Reward of an answer: by a reward model, by functions, or by both, weighted.

    reward = model weight * clipped, scaled score of the model + sum of weight * function's value

The clip keeps a reward model's outliers from deciding an update; values of functions are taken as
they are. A function gets texts (`reward_functions.py`). A prompt is the prompt as the policy reads
it, the markers of its format and of a chat template included, without a beginning-of-text token in
front. An answer is the sampled text without end token and other special tokens; nothing else is
stripped.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from dschat.data.config import DataConfig
from dschat.errors import UserError
from dschat.functional.returns import masked_mean, masked_moments
from dschat.models.reward_statistics import RewardStatistics, reward_scaling
from dschat.rlhf.experience import Experience, filled
from dschat.rlhf.part_config import RewardConfig
from dschat.rlhf.reward_functions import FLAG, RewardFunction, all_columns, load_functions
from dschat.text.encoding import decode
from dschat.utils.distributed import all_reduce_sum, on_every_rank


@dataclass(frozen=True)
class Rewards:
    """Makes the rewards of answers from their scores; build with `load`."""

    config: RewardConfig = RewardConfig()
    functions: tuple[RewardFunction, ...] = ()
    scaling: RewardStatistics | None = None

    @classmethod
    def load(cls, config: RewardConfig, reward_model: str | None) -> Rewards:
        """Import the functions and read the scaling; before models are loaded.

        Args:
            reward_model: folder or hub id; None where functions are all there is.

        Raises:
            UserError: no such function, a weight of a model that is not there, or no scaling.
        """
        if reward_model is None and config.reward_model_weight not in (0.0, 1.0):
            raise UserError(
                f"reward_model_weight is {config.reward_model_weight}, and there is no reward "
                "model: give reward_model_name_or_path, or drop the weight"
            )
        if reward_model is None and not any(config.weights):
            raise UserError(
                "reward_function_weight is 0, and there is no reward model: nothing is rewarded; "
                "give reward_model_name_or_path, or another weight"
            )
        scaling = reward_scaling(config.reward_scaling, reward_model)
        return cls(config, load_functions(config), scaling)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each function."""
        return self.config.reward_function_weight or (1.0,) * len(self.functions)

    def reading(self, data: DataConfig) -> DataConfig:
        """Return settings of the data under which rows keep the columns that the functions take."""
        return replace(data, read=replace(data.read, kept=all_columns(self.functions)))

    def applied(self, e: Experience, tokenizer: PreTrainedTokenizerBase) -> Experience:
        """Add `rewards` and, where there are functions, their own scores.

        An answer is `scored` where anything that counts gives it a score. Every rank calls it as
        often: an error of a function on one of them stops all.
        """
        rewards = e.logprobs.new_zeros(len(e))
        scored = torch.zeros_like(e.real) if self.functions else torch.ones_like(e.real)
        if e.model_scores is not None:
            clip = self.config.reward_clip
            clipped = self._scaled(e.model_scores).clamp(-clip, clip)
            rewards = rewards + self.config.reward_model_weight * clipped
            scored = scored | (self.config.reward_model_weight != 0)
        if not self.functions:
            return replace(e, rewards=rewards, scored=scored)
        values = on_every_rank(lambda: _values(self.functions, e, tokenizer))
        given = torch.tensor([[v is not None for v in row] for row in values], device=scored.device)
        scores = rewards.new_tensor([[v or 0.0 for v in row] for row in values])
        for k, weight in enumerate(self.weights):
            rewards = rewards + weight * scores[:, k]
            scored = scored | (given[:, k] & (weight != 0))
        return replace(
            e, rewards=rewards, scored=scored, function_scores=scores, function_scored=given
        )

    def _scaled(self, model_scores: torch.Tensor) -> torch.Tensor:
        return model_scores if self.scaling is None else self.scaling.scaled(model_scores)

    def statistics(self, experiences: Sequence[Experience]) -> dict[str, float]:
        """Spread of the rewards over all ranks, mean of each part, shares of a kind.

        `reward_model` is the model's own unscaled score, comparable with step 2's figures. A
        function's mean is over the answers that it scored; one that scored none has no figure.
        """
        rows = torch.cat([e.real for e in experiences])
        counted = torch.cat([e.counted for e in experiences])
        rewards = torch.cat([filled(e.rewards) for e in experiences])
        figures = {}
        if any(all_reduce_sum([float(counted.sum().item())])):
            _, variance = masked_moments(rewards, counted, all_reduce_sum)
            figures["reward_std"] = math.sqrt(variance)
        if all(e.model_scores is not None for e in experiences):
            scores = torch.cat([filled(e.model_scores) for e in experiences])
            figures["reward_model"] = masked_mean(scores, rows, all_reduce_sum)
            if self.config.reward_model_weight:
                beyond = (self._scaled(scores).abs() >= self.config.reward_clip).float()
                figures["reward_clipped"] = masked_mean(beyond, rows, all_reduce_sum)
        return figures | self._of_functions(experiences, rows)

    def _of_functions(
        self, experiences: Sequence[Experience], rows: torch.Tensor
    ) -> dict[str, float]:
        """Mean of each function by its name; of a single one also as `reward_function`."""
        if not self.functions:
            return {}
        scores = torch.cat([filled(e.function_scores) for e in experiences])
        given = torch.cat([filled(e.function_scored) for e in experiences]) & rows[:, None]
        totals = all_reduce_sum((scores.double() * given).sum(0).tolist())
        counts = all_reduce_sum(given.double().sum(0).tolist())
        means = {
            f"rewards/{name}": total / count
            for name, total, count in zip(self.names, totals, counts, strict=True)
            if count
        }
        if len(means) == len(self.functions) == 1:
            (means["reward_function"],) = means.values()
        scored = torch.cat([filled(e.scored) for e in experiences]).float()
        return means | {"unscored": 1.0 - masked_mean(scored, rows, all_reduce_sum)}

    @property
    def names(self) -> list[str]:
        """Names of the functions in figures: without their modules where that is clear."""
        short = Counter(function.short_name for function in self.functions)
        return [f.short_name if short[f.short_name] == 1 else f.name for f in self.functions]

    def record(self) -> dict[str, object]:
        """Facts that a resumed run must find again, by the names that messages use."""
        scaling = {} if self.scaling is None else vars(self.scaling)
        facts = {f"reward_scaling.{name}": value for name, value in scaling.items()}
        digests = [f.digest for f in self.functions if f.digest]
        if digests:
            joint = digests[0] if len(digests) == 1 else _digest(digests)
            facts[f"{FLAG}.source"] = joint
        return facts


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _values(
    functions: Sequence[RewardFunction], e: Experience, tokenizer: PreTrainedTokenizerBase
) -> list[list[float | None]]:
    """Scores of every row by each function, (B, F); filler rows are not asked for and have none."""
    real = [row for row in range(len(e)) if e.real[row]]
    texts = [texts_of(e, row, tokenizer) for row in real]
    prompts, answers = [prompt for prompt, _ in texts], [answer for _, answer in texts]
    columns = None if e.columns is None else [e.columns[row] for row in real]
    values: list[list[float | None]] = [[None] * len(functions) for _ in range(len(e))]
    for k, function in enumerate(functions):
        for row, value in zip(real, function.scores(prompts, answers, columns), strict=True):
            values[row][k] = value
    return values


def texts_of(e: Experience, row: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Decode prompt and answer of one row as a reward function gets them."""
    start = e.prompt_length
    prompt = e.sequences[row, :start][e.attention_mask[row, :start]].tolist()
    if prompt and prompt[0] == tokenizer.bos_token_id:
        prompt = prompt[1:]
    answer = e.answers[row][e.answer_mask[row]].tolist()
    if answer and answer[-1] == tokenizer.eos_token_id:
        answer = answer[:-1]
    return decode(tokenizer, prompt), decode(tokenizer, answer, skip_special_tokens=True)
