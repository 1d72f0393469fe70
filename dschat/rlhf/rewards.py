"""Where an answer's reward comes from: a reward model, the user's own function, or both, weighted.

    score = model weight * scaled score of the model + function weight * what the function returns

The function is called with two texts. `prompt` is the prompt as the policy reads it, the markers of
its format and of a chat template included, without a beginning-of-text token in front. `answer` is
what the policy sampled, without end token and other special tokens; nothing else is stripped.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from dschat.data.user_functions import function_of, source_digest
from dschat.errors import UserError, brief
from dschat.functional.returns import masked_mean, masked_moments
from dschat.models.reward_statistics import RewardStatistics
from dschat.rlhf.experience import Experience
from dschat.utils.distributed import all_reduce_sum, on_every_rank

FLAG = "reward_function"
SHOWN_CHARACTERS = 80  # of a text in a message
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class RewardFunction:
    """The user's (prompt, answer) -> float, whatever it returns checked."""

    name: str  # module:name
    function: Callable[[str, str], float]
    digest: str  # of its source file

    @classmethod
    def load(cls, name: str) -> RewardFunction:
        """Import it.

        Raises:
            UserError: no such module or function, or one that does not take two texts.
        """
        function = function_of(name, FLAG, "prompt", "answer")
        return cls(name, function, source_digest(name, FLAG))

    def __call__(self, prompt: str, answer: str) -> float:
        """The reward of one answer.

        Raises:
            UserError: the function fails, or returns no finite number; names prompt and answer.
        """
        place = f"for the prompt {_tail(prompt)} and the answer {_tail(answer)}"
        try:
            value = self.function(prompt, answer)
        except Exception as error:  # whatever the user's function raises, with its row
            raise UserError(
                f"--{FLAG} {self.name} fails ({brief(error, with_type=True)}) {place}"
            ) from error
        # A NaN is not below anything; scores are fp32.
        if not isinstance(value, numbers.Real) or not abs(value) <= LARGEST:
            raise UserError(
                f"--{FLAG} {self.name} returned {value!r} {place}: return a finite number"
            )
        return float(value)


def _tail(text: str) -> str:
    cut = text if len(text) <= SHOWN_CHARACTERS else f"…{text[1 - SHOWN_CHARACTERS :]}"
    return repr(cut)


@dataclass(frozen=True)
class Rewards:
    """What becomes the score of an answer."""

    function: RewardFunction | None = None
    function_weight: float = 1.0
    model_weight: float = 1.0
    scaling: RewardStatistics | None = None

    def applied(
        self, e: Experience, tokenizer: PreTrainedTokenizerBase, has_model: bool = True
    ) -> Experience:
        """The rollout with `scores` put together from their parts, which are kept beside them.

        Every rank calls it as often: an error of the function on one of them stops all.

        Args:
            e: with the reward model's own scores; without one they are not looked at.
        """
        scores, model, function = torch.zeros_like(e.scores), None, None
        if has_model:
            model = e.scores
            scaled = model if self.scaling is None else self.scaling.scaled(model)
            scores = scores + self.model_weight * scaled
        if self.function is not None:
            values = on_every_rank(lambda: self._called(e, tokenizer))
            function = torch.tensor(values, dtype=scores.dtype, device=scores.device)
            scores = scores + self.function_weight * function
        return replace(e, scores=scores, model_scores=model, function_scores=function)

    def _called(self, e: Experience, tokenizer: PreTrainedTokenizerBase) -> list[float]:
        """The function's value of every real row; filler rows get 0."""
        return [
            self.function(*texts_of(e, row, tokenizer)) if e.real[row] else 0.0
            for row in range(len(e.scores))
        ]

    def record(self) -> dict[str, object]:
        """What a resumed run must find again, by the names that messages call it by."""
        scaling = {} if self.scaling is None else vars(self.scaling)
        found = {f"reward_scaling.{name}": value for name, value in scaling.items()}
        if self.function is not None:
            found[f"{FLAG}.source"] = self.function.digest
        return found


def texts_of(e: Experience, row: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Prompt and answer of one row, as a reward function gets them."""
    start = e.prompt_length
    prompt = e.sequences[row, :start][e.attention_mask[row, :start]].tolist()
    if prompt and prompt[0] == tokenizer.bos_token_id:
        prompt = prompt[1:]
    answer = e.answers[row][e.answer_mask[row]].tolist()
    if answer and answer[-1] == tokenizer.eos_token_id:
        answer = answer[:-1]
    plain = {"clean_up_tokenization_spaces": False}
    return (
        tokenizer.decode(prompt, **plain),
        tokenizer.decode(answer, skip_special_tokens=True, **plain),
    )


def score_statistics(experiences: Sequence[Experience], clip: float) -> dict[str, float]:
    """Spread of the scores over all ranks, share of them beyond the clip, mean of each part.

    `reward_model` is the model's own unscaled score, comparable with step 2's figures.
    """
    rows = torch.cat([e.real for e in experiences])
    scores = torch.cat([e.scores for e in experiences])
    _, variance = masked_moments(scores, rows, all_reduce_sum)
    figures = {
        "reward_std": math.sqrt(variance),
        "reward_clipped": masked_mean((scores.abs() >= clip).float(), rows, all_reduce_sum),
    }
    for name, part in (("reward_model", "model_scores"), ("reward_function", "function_scores")):
        values = [getattr(e, part) for e in experiences]
        if all(v is not None for v in values):
            figures[name] = masked_mean(torch.cat(values), rows, all_reduce_sum)
    return figures
