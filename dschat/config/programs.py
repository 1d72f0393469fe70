"""Settings of programs that do not train: evaluation, chat, a look at data."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, replace
from typing import ClassVar

from dschat.config.answering import AnsweringSettings, check_named_once
from dschat.data.config import SHORTEST, DataConfig, SFTDataConfig
from dschat.errors import UserError
from dschat.settings import Settings, given_flags, group, setting
from dschat.train.run_config import StartConfig
from dschat.utils.addresses import check_address, is_address
from dschat.utils.ds_utils import DTYPES

KEY = "OPENAI_API_KEY"  # environment variable of the key of a server that chats

# Prompts of `prompt_eval.py`.
QUESTIONS = {
    "English": (
        "Please tell me about Microsoft in a few sentences?",
        "Explain the moon landing to a 6 year old in a few sentences.",
        "Write a short poem about a wise frog.",
        "Who was president of the United States in 1955?",
        "How does a telescope work?",
        "Why do birds migrate south for the winter?",
    ),
    "Chinese": (
        "请用几句话介绍一下微软?",
        "用几句话向6岁的孩子解释登月。",
        "鸟类为什么要南迁过冬?",
    ),
    "Japanese": ("マイクロソフトについて簡単に教えてください。", "望遠鏡はどのように機能しますか?"),
}


@dataclass(frozen=True)
class PromptEvaluation(Settings):
    """Settings of `prompt_eval.py`."""

    model_name_or_path_baseline: str = setting(MISSING, "model before fine-tuning")
    model_name_or_path_finetune: str = setting(MISSING, "model after fine-tuning")
    num_beams: int = setting(1, "beams of the beam search; 1: none", at_least=1)
    num_beam_groups: int = setting(1, "transformers 5 has no group beam search", retired=True)
    top_k: int = setting(4, "top-k of the sampled answers", at_least=1)
    penalty_alpha: float = setting(0.6, "transformers 5 has no contrastive search", retired=True)
    num_return_sequences: int = setting(1, "sampled answers per prompt", at_least=1)
    max_new_tokens: int = setting(100, "tokens of an answer", at_least=1)
    language: str = setting("English", "of the built-in prompts", choices=tuple(QUESTIONS))
    prompts: tuple[str, ...] = setting((), "your own questions instead")
    raw: bool = setting(False, "take prompts as they are, without turns")
    add_eot_token: bool = setting(False, "answers end with <|endoftext|>")
    dtype: str = setting("auto", "number format", choices=("auto", *DTYPES))
    seed: int = setting(1234, "seed of sampling", at_least=0)


@dataclass(frozen=True, kw_only=True)
class RewardEvaluation(StartConfig):
    """Settings of `rw_eval.py`."""

    model_name_or_path: str = setting(MISSING, "model folder or hub id")
    batch_size: int = setting(16, "rows per batch", at_least=1)
    max_seq_len: int = setting(512, "tokens of prompt and answer together", at_least=SHORTEST)
    data: DataConfig = group(DataConfig)
    all_rows: bool = setting(False, "score the training rows as well: nothing was trained on them")
    without_end: bool = setting(
        False, "score answers without their end token, as those that a length limit cuts"
    )
    show: int = setting(3, "pairs whose scores are printed", at_least=0)
    output_dir: str | None = setting(None, "folder for evaluation.json and its plot")
    stdin: bool = setting(
        False,
        "score lines of standard input, one JSON line each: an object with prompt and response, or "
        "a text as it stands",
    )
    num_padding_at_beginning: int = setting(1, "masks come from lengths", retired=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.all_rows and self.data.streaming:
            raise UserError("all_rows: streamed rows are not kept; drop streaming")
        given = {flag.name for flag in given_flags(self)}
        for other in ("all_rows", "output_dir", "data_path"):
            if self.stdin and other in given:
                raise UserError(
                    f"stdin and {other} contradict: lines are scored one by one; drop one"
                )

    @property
    def rows(self) -> DataConfig:
        """The data as it is read: what `no_use` names has no effect; all rows are one set."""
        if not self.all_rows:
            return replace(self.data, data_split=None, max_train_samples=None)
        return replace(self.data, data_split="1", max_train_samples=None, max_eval_samples=None)

    @property
    def no_use(self) -> dict[str, str]:
        """Flags without effect, each with the reason."""
        names: tuple[str, ...] = ("data_split", "max_train_samples")
        reason = "all rows are scored" if self.all_rows else "the rows that are held out are scored"
        if self.stdin:
            names += ("max_eval_samples", "streaming", "batch_size", "show", "without_end")
            reason = "lines of standard input are scored one by one, as they stand"
        return dict.fromkeys(names, reason)


@dataclass(frozen=True, kw_only=True)
class WinRateSettings(AnsweringSettings):
    """Settings of `python -m dschat.winrate`."""

    candidates: tuple[str, ...] = setting(
        MISSING,
        "two of them, the first against the second: model folders, adapters, hub ids, or files of "
        "prompt and response",
    )
    prompts: str = setting(MISSING, "file, folder or hub id; of a source, its test rows")
    judge: str = setting(MISSING, "reward model, or a chat model that is asked to choose")
    output_dir: str | None = setting(
        None, "folder for winrate.json, with a row for each prompt, and the answers as files"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.candidates) != 2:
            raise UserError(f"candidates names {len(self.candidates)}: give two")
        check_named_once(self.candidates, "candidates")
        for name in (*self.candidates, self.judge):
            if is_address(name):
                raise UserError(
                    f"{name} is an address: servers are not asked; give a model folder or a hub "
                    "id, or as a candidate a file of the server's answers"
                )


@dataclass(frozen=True)
class ChatSettings(Settings):
    """Settings of the chatbot."""

    WORDS: ClassVar[tuple[str, str]] = "path", "FOLDER|URL"

    path: str = setting(
        MISSING,
        "folder of a trained model or of an adapter, hub id, or URL of an OpenAI-compatible server",
    )
    model: str | None = setting(
        None, "which of the server's models answers (default: the only one that it has)"
    )
    system: str | None = setting(None, "system prompt, at the beginning of every conversation")
    max_new_tokens: int = setting(128, "longest answer", at_least=1)
    temperature: float = setting(
        0.7, "of sampling; 0 takes the likeliest token each time", at_least=0
    )
    top_p: float = setting(
        0.95, "sample among the likeliest tokens of this total probability", above=0, at_most=1
    )
    seed: int = setting(1234, "seed of sampling", at_least=0)
    dtype: str = setting(
        "auto", "auto is the saved one, fp32 on a CPU", choices=("auto", "fp32", "bf16", "fp16")
    )
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    raw: bool = setting(False, "send each text as it is, without turns or memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_server:
            check_address("path", self.path, "http://localhost:8000/v1", KEY)

    @property
    def is_server(self) -> bool:
        """Return whether a server answers, not a folder's model."""
        return is_address(str(self.path))

    @property
    def no_use(self) -> dict[str, str]:
        """Flags without effect, each with the reason."""
        if self.is_server:
            reasons = dict.fromkeys(("dtype", "device"), "the server decides")
        else:
            reasons = {"model": "it is of a server, and path is a folder"}
        if self.raw:
            reasons["system"] = "with --raw there are no turns"
        return reasons


@dataclass(frozen=True)
class InspectSettings(Settings):
    """Flags of `inspect`; names and defaults are those of training."""

    model_name_or_path: str = setting(MISSING, "whose tokenizer is used: a folder or hub id")
    data: SFTDataConfig = group(SFTDataConfig)
    phase: int | None = setting(None, "1, 2 or 3 (default: all)", choices=(1, 2, 3))
    max_seq_len: int = setting(512, "tokens of prompt and answer together", at_least=SHORTEST)
    max_prompt_seq_len: int = setting(256, "tokens of a prompt in phase 3", at_least=1)
    per_device_train_batch_size: int = setting(16, "rows per batch", at_least=1)
    max_tokens_per_batch: int | None = setting(
        None, "tokens per batch, where batches are made by them (default: 8192)", at_least=1
    )
    samples: int = setting(3, "rows to show", at_least=0)
    seed: int = setting(1234, "seed of splits; as in training", at_least=0)
    add_eot_token: bool = setting(False, "end answers with --eot_token instead of the eos")
    eot_token: str = setting("<|endoftext|>", "the token of --add_eot_token")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.streaming:
            raise UserError("streaming: inspect looks at all rows; drop it, or give it fewer")
