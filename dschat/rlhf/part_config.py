"""Settings of the parts of PPO: sampling, rewards, text beside it, the moving average."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dschat.errors import UserError
from dschat.settings import Settings, setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dschat.data.text_blocks import TextBlocks


@dataclass(frozen=True)
class SamplingConfig(Settings):
    """Settings of sampling; the defaults sample the policy itself, as PPO assumes."""

    max_answer_seq_len: int = setting(256, "tokens of an answer", at_least=1)
    temperature: float = setting(1.0, "sampling temperature", above=0)
    top_p: float = setting(1.0, "nucleus sampling", above=0, at_most=1)
    top_k: int = setting(0, "top-k sampling; 0 is off", at_least=0)
    min_answer_seq_len: int = setting(
        0, "tokens before which the end token is not sampled", at_least=0
    )
    stop_strings: tuple[str, ...] = setting((), "texts that end an answer, beside the end token")
    greedy: bool = False  # the likeliest token instead of a drawn one; no flag

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_answer_seq_len > self.max_answer_seq_len:
            raise UserError(
                f"min_answer_seq_len is {self.min_answer_seq_len}: give at most max_answer_seq_len,"
                f" which is {self.max_answer_seq_len}"
            )

    @property
    def filters(self) -> tuple[str, ...]:
        """Settings by which tokens are drawn from a part of the distribution alone."""
        active = {
            "top_p": self.top_p < 1,
            "top_k": self.top_k > 0,
            "min_answer_seq_len": self.min_answer_seq_len > 0,
        }
        return tuple(name for name, is_active in active.items() if is_active)


@dataclass(frozen=True)
class RewardConfig(Settings):
    """Settings of the reward of an answer."""

    reward_function: tuple[str, ...] = setting(
        (),
        "module:name of each of your functions (prompts, answers, **columns) -> scores or "
        "(prompt, answer) -> score; exact_number, pattern and length are built in",
    )
    reward_function_weight: tuple[float, ...] = setting(
        (), "factor of each function's value in the reward (default: 1 each)"
    )
    reward_pattern: str | None = setting(
        None, "regular expression that fits an answer as a whole, for reward_function pattern"
    )
    reward_length: tuple[int, ...] = setting(
        (), "least and largest number of characters, for reward_function length", at_least=0
    )
    reward_model_weight: float = setting(
        1.0, "factor of the reward model's score; at 0 it is only watched"
    )
    reward_scaling: str = setting(
        "auto",
        "saved: the reward model's scores less their mean, over their spread, as step 2 saved "
        "them; auto: so where it did; none: as they are",
        choices=("auto", "saved", "none"),
    )
    reward_clip: float = setting(
        5.0, "the reward model's scaled scores are clipped to this magnitude", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names, weights = self.reward_function, self.reward_function_weight
        if weights and not names:
            raise UserError(
                f"reward_function_weight is {_listed(weights)}, and there is no "
                "function: give reward_function module:name, or drop the weight"
            )
        if weights and len(weights) != len(names):
            raise UserError(
                f"reward_function_weight is {_listed(weights)}: give one for each of the "
                f"{len(names)} functions of reward_function"
            )
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"reward_function names {repeated[0]} twice: give it once, weighted")
        if self.reward_model_weight == 0 and not any(self.weights):
            raise UserError(
                "reward_model_weight is 0: nothing is rewarded; give reward_function "
                "module:name, or another weight"
            )
        self._check_built_in()

    def _check_built_in(self) -> None:
        """Refuse a built-in check without what it needs, or settings that no check uses."""
        for name, flag, value in (
            ("pattern", "reward_pattern", self.reward_pattern),
            ("length", "reward_length", self.reward_length),
        ):
            if bool(value) != (name in self.reward_function):
                missing = f"reward_function {name}" if value else flag
                shown = flag if value else f"reward_function {name}"
                raise UserError(f"{shown} does nothing without {missing}: give both, or neither")
        if self.reward_length and (
            len(self.reward_length) != 2 or self.reward_length[0] > self.reward_length[1]
        ):
            raise UserError(
                f"reward_length is {_listed(self.reward_length)}: give two numbers, the least "
                "length and the largest"
            )

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each function."""
        return self.reward_function_weight or (1.0,) * len(self.reward_function)


def _listed(values: Sequence[object]) -> str:
    return " ".join(map(str, values))


@dataclass(frozen=True)
class PTXConfig(Settings):
    """Settings of PTX."""

    unsupervised_dataset_name: str | None = setting(
        None, "text that the actor goes on learning beside PPO: file, folder or hub id"
    )
    unsupervised_dataset_config_name: str | None = setting(None, "configuration of a hub id")
    unsup_coef: float = setting(
        1.0,  # both gradients are then about as large (docs/ppo/rewards.md)
        "weight of that text's mean loss per token against PPO's mean loss per token",
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        name, config = self.unsupervised_dataset_name, self.unsupervised_dataset_config_name
        if name is None and config is not None:
            raise UserError(
                f"unsupervised_dataset_config_name {config}: there is no text; give "
                "unsupervised_dataset_name, or drop it"
            )

    def blocks(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        cache: str | None,
        once: Callable[[Callable[[], str]], str],
        keep_special_tokens: bool,
    ) -> TextBlocks | None:
        """Read the text in blocks of `length` tokens; None where the settings name none."""
        name, config = self.unsupervised_dataset_name, self.unsupervised_dataset_config_name
        if name is None:
            return None
        from dschat.data.text_blocks import create_text_blocks

        return create_text_blocks(name, config, tokenizer, length, cache, once, keep_special_tokens)


@dataclass(frozen=True)
class EMAConfig(Settings):
    """Settings of the actor's moving average."""

    enable_ema: bool = setting(False, "keep a moving average of the actor, saved beside it")
    ema_decay: float = setting(0.992, "decay of the moving average", at_least=0, below=1)
