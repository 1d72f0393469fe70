"""Settings of programs that let several models answer prompts: win rate, comparison."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from dschat.data.config import SHORTEST
from dschat.data.user_reader import ReadOptions
from dschat.errors import UserError
from dschat.lazy import torch
from dschat.rlhf.part_config import SamplingConfig
from dschat.settings import Settings, group, setting
from dschat.text.formats import PROMPT_FORMATS
from dschat.utils.ds_utils import DTYPES

if TYPE_CHECKING:
    from dschat.rlhf.candidates import AnsweringLimits
    from dschat.rlhf.judges import JudgeLimits

PORT = 7860  # of the page where one types
MOST_MODELS = 3


@dataclass(frozen=True, kw_only=True)
class AnsweringSettings(Settings):
    """How models answer, and how answers are judged."""

    max_prompts: int | None = setting(None, "use at most so many prompts", at_least=1)
    read: ReadOptions = group(ReadOptions)
    prompt_format: str | None = setting(
        None,
        "format of models that carry none (default: chat where there is a template, else dschat)",
        choices=PROMPT_FORMATS,
    )
    sampling: SamplingConfig = group(SamplingConfig)
    max_prompt_seq_len: int = setting(256, "tokens of a prompt", at_least=1)
    max_seq_len: int = setting(1024, "tokens that the judge reads at a time", at_least=SHORTEST)
    greedy: bool = setting(False, "answer by the likeliest token, not by a drawn one")
    batch_size: int = setting(16, "rows per batch", at_least=1)
    dtype: str = setting("auto", "auto is bf16 where the device has it", choices=("auto", *DTYPES))
    seed: int = setting(1234, "seed of sampling", at_least=0)

    def limits(self) -> tuple[AnsweringLimits, JudgeLimits]:
        """Collect what answers are sampled under, and what a judge reads at most."""
        from dschat.rlhf.candidates import AnsweringLimits
        from dschat.rlhf.judges import JudgeLimits
        from dschat.train.engine import resolve_dtype, torch_dtype

        dtype = torch_dtype(resolve_dtype(self.dtype))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sampling = replace(self.sampling, greedy=self.greedy)
        answering = AnsweringLimits(
            *(sampling, self.prompt_format, self.max_prompt_seq_len, self.batch_size),
            *(self.seed, dtype, device),
        )
        judging = JudgeLimits(self.prompt_format, self.max_seq_len, self.batch_size, dtype, device)
        return answering, judging


def check_named_once(names: Sequence[str], setting: str) -> None:
    """Stop where one model or file is to be compared with itself: drawn by one seed, it ties.

    Raises:
        UserError: two of the names are one path, or one hub id.
    """
    seen: dict[str, str] = {}
    for name in names:
        path = os.path.realpath(name)
        if (first := seen.get(path)) is not None:
            also = "" if name == first else f", also as {name}"
            raise UserError(
                f"{setting} names {first} twice{also}: it would tie with itself; name another"
            )
        seen[path] = name


@dataclass(frozen=True, kw_only=True)
class CompareSettings(AnsweringSettings):
    """Settings of `dschat compare`."""

    WORDS: ClassVar[tuple[str, str]] = "models", "A B [C]"

    models: tuple[str, ...] = setting(
        MISSING,
        "two or three: model folders, adapters, hub ids, or files of prompt and response",
    )
    prompts: str | None = setting(None, "file, folder or hub id; of a source, its test rows")
    max_prompts: int | None = setting(100, "use at most so many prompts", at_least=1)
    reward_model: str | None = setting(None, "reward model that scores the answers")
    output: str = setting("compare.html", "file of the page")
    live: bool = setting(False, "open a page where you type, and all models answer as you watch")
    port: int = setting(PORT, "of the live page, on this machine", at_least=1, at_most=65535)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 1 if self.live else 2
        if not least <= len(self.models) <= MOST_MODELS:
            raise UserError(
                f"models names {len(self.models)}: give {least} to {MOST_MODELS}, as in "
                "dschat compare ./sft ./ppo"
            )
        if self.live and self.prompts is not None:
            raise UserError("live and prompts contradict: you type the prompts; drop one")
        if self.live and self.reward_model is not None:
            raise UserError(
                "live and reward_model contradict: the live page scores nothing; drop one"
            )
        if not self.live and self.prompts is None:
            raise UserError("prompts is required: a file of them; or add live, and type them")
        if not self.live:
            check_named_once(self.models, "models")
