"""Reward of an answer: by a reward model, by the user's own function, or by both, weighted.

    reward = model weight * clipped, scaled score of the model + function weight * function's value

The clip keeps a reward model's outliers from deciding an update; the function's values are taken as
they are. The function is called with two texts. `prompt` is the prompt as the policy reads it, the
markers of its format and of a chat template included, without a beginning-of-text token in front.
`answer` is the sampled text without end token and other special tokens; nothing else is stripped.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from dschat.errors import UserError, brief
from dschat.functional.returns import masked_mean, masked_moments
from dschat.models.reward_statistics import RewardStatistics, reward_scaling
from dschat.rlhf.experience import Experience, filled
from dschat.rlhf.part_config import RewardConfig
from dschat.text.encoding import decode
from dschat.utils.distributed import all_reduce_sum, on_every_rank
from dschat.utils.user_functions import load_function, source_digest

FLAG = "reward_function"
SHOWN_CHARACTERS = 80  # of a text in a message
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class RewardFunction:
    """Function of the user, (prompt, answer) -> float; its values are checked."""

    name: str  # module:name
    function: Callable[[str, str], float]
    digest: str  # of its source file

    @classmethod
    def load(cls, name: str) -> RewardFunction:
        """Import it.

        Raises:
            UserError: no such module or function, or one that does not take two texts.
        """
        function = load_function(name, FLAG, "prompt", "answer")
        return cls(name, function, source_digest(name, FLAG))

    def __call__(self, prompt: str, answer: str) -> float:
        """Compute the reward of one answer.

        Raises:
            UserError: the function fails, or returns no finite number; names prompt and answer.
        """
        place = f"for the prompt {_tail(prompt)} and the answer {_tail(answer)}"
        try:
            value = self.function(prompt, answer)
        except Exception as error:  # anything that the user's function raises, with its row
            raise UserError(
                f"{FLAG} {self.name} fails ({brief(error, with_type=True)}) {place}"
            ) from error
        # A NaN is not below anything; scores are fp32.
        if not isinstance(value, numbers.Real) or not abs(value) <= LARGEST:
            raise UserError(
                f"{FLAG} {self.name} returned {value!r} {place}: return a finite number"
            )
        return float(value)


def _tail(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else f"…{text[1 - SHOWN_CHARACTERS :]}")


@dataclass(frozen=True)
class Rewards:
    """Makes the rewards of answers from their scores; build with `load`."""

    config: RewardConfig = RewardConfig()
    function: RewardFunction | None = None
    scaling: RewardStatistics | None = None

    @classmethod
    def load(cls, config: RewardConfig, reward_model: str | None) -> Rewards:
        """Import the function and read the scaling; before models are loaded.

        Args:
            reward_model: folder or hub id; None where the function is all there is.

        Raises:
            UserError: no such function, a weight of a model that is not there, or no scaling.
        """
        if reward_model is None and config.reward_model_weight not in (0.0, 1.0):
            raise UserError(
                f"reward_model_weight is {config.reward_model_weight}, and there is no reward "
                "model: give reward_model_name_or_path, or drop the weight"
            )
        if reward_model is None and config.reward_function_weight == 0:
            raise UserError(
                "reward_function_weight is 0, and there is no reward model: nothing is rewarded; "
                "give reward_model_name_or_path, or another weight"
            )
        name = config.reward_function
        return cls(
            config,
            None if name is None else RewardFunction.load(name),
            reward_scaling(config.reward_scaling, reward_model),
        )

    def applied(self, e: Experience, tokenizer: PreTrainedTokenizerBase) -> Experience:
        """Add `rewards` and, where there is a function, its own scores.

        Every rank calls it as often: an error of the function on one of them stops all.
        """
        rewards, function_scores = e.logprobs.new_zeros(len(e)), None
        if e.model_scores is not None:
            clip = self.config.reward_clip
            clipped = self._scaled(e.model_scores).clamp(-clip, clip)
            rewards = rewards + self.config.reward_model_weight * clipped
        function = self.function
        if function is not None:
            values = on_every_rank(lambda: _values(function, e, tokenizer))
            function_scores = torch.tensor(values, dtype=rewards.dtype, device=rewards.device)
            rewards = rewards + self.config.reward_function_weight * function_scores
        return replace(e, rewards=rewards, function_scores=function_scores)

    def _scaled(self, model_scores: torch.Tensor) -> torch.Tensor:
        return model_scores if self.scaling is None else self.scaling.scaled(model_scores)

    def statistics(self, experiences: Sequence[Experience]) -> dict[str, float]:
        """Spread of the rewards over all ranks, mean of each part, share of clipped scores.

        `reward_model` is the model's own unscaled score, comparable with step 2's figures.
        """
        rows = torch.cat([e.real for e in experiences])
        rewards = torch.cat([filled(e.rewards) for e in experiences])
        _, variance = masked_moments(rewards, rows, all_reduce_sum)
        figures = {"reward_std": math.sqrt(variance)}
        for name, part in (
            ("reward_model", "model_scores"),
            ("reward_function", "function_scores"),
        ):
            columns = [getattr(e, part) for e in experiences]
            if all(column is not None for column in columns):
                figures[name] = masked_mean(torch.cat(columns), rows, all_reduce_sum)
        if "reward_model" in figures and self.config.reward_model_weight:
            scores = self._scaled(torch.cat([filled(e.model_scores) for e in experiences]))
            beyond = (scores.abs() >= self.config.reward_clip).float()
            figures["reward_clipped"] = masked_mean(beyond, rows, all_reduce_sum)
        return figures

    def record(self) -> dict[str, object]:
        """Facts that a resumed run must find again, by the names that messages use."""
        scaling = {} if self.scaling is None else vars(self.scaling)
        facts = {f"reward_scaling.{name}": value for name, value in scaling.items()}
        if self.function is not None:
            facts[f"{FLAG}.source"] = self.function.digest
        return facts


def _values(
    function: RewardFunction, e: Experience, tokenizer: PreTrainedTokenizerBase
) -> list[float]:
    """Call the function on every real row; filler rows get 0."""
    return [function(*texts_of(e, row, tokenizer)) if e.real[row] else 0.0 for row in range(len(e))]


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
