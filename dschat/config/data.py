"""Flags of the data, of batches, and of scripts that evaluate one model."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass

from dschat.config.run import RunArguments
from dschat.data.batching import ByRows, ByTokens, Grouping, Packed
from dschat.data.datasets import DataSpec
from dschat.data.registry import Reading
from dschat.errors import UserError
from dschat.settings import Settings, setting
from dschat.text.formats import PROMPT_FORMATS


@dataclass(frozen=True)
class DataArguments(Settings):
    """Flags of the data of every step."""

    data_path: tuple[str, ...] = setting(
        ("Dahoas/rm-static",), "files, folders or hub ids of preference data", may_be_empty=True
    )
    data_split: str = setting("2,4,4", "proportions of the training data for steps 1, 2 and 3")
    data_output_path: str = setting("/tmp/data_files/", "cache of tokenised data")
    dataset_columns: tuple[str, ...] = setting(
        (),
        "which columns hold what: prompt=question.text chosen=best rejected=worst "
        "(default: recognised)",
    )
    dataset_function: str | None = setting(
        None, "module:name of your function from a row to prompt, chosen, rejected"
    )
    prompt_format: str | None = setting(
        None,
        "dschat: Human: and Assistant:; chat: the chat template (default: the model's own, else "
        "chat where the tokenizer has a template)",
        choices=tuple(PROMPT_FORMATS),
    )
    preprocessing_num_workers: int | None = setting(
        None,
        "processes that tokenise, on each node (default: by cores, 1 for small sets)",
    )
    streaming: bool = setting(
        False,
        "tokenise rows as they are read and keep nothing on disk; needs --max_steps",
    )
    max_train_samples: int | None = setting(None, "use at most so many training rows")
    max_eval_samples: int | None = setting(None, "use at most so many evaluation rows")

    def check_streaming(self, run: RunArguments, max_steps: int, batching: str | None) -> None:
        """Stop where rows that nobody has counted cannot serve.

        Args:
            batching: the flag that asks for batches other than by rows.
        """
        if not self.streaming:
            return
        refused = {
            "max_train_samples": (self.max_train_samples is not None, "give max_steps alone"),
            "preprocessing_num_workers": (
                self.preprocessing_num_workers is not None,
                "each rank tokenises its own rows; drop it",
            ),
            "num_train_epochs": (run.num_train_epochs > 1, "max_steps is the only limit; drop it"),
            "save_steps or resume": (
                run.state_config().in_use,
                "a stream cannot go on from its middle, nor be told from an edited one; drop it",
            ),
            batching: (batching is not None, "it needs all lengths of an epoch; drop it"),
        }
        if max_steps < 1:
            raise UserError("streaming: nobody knows how many rows there are; give max_steps")
        for name, (is_given, why) in refused.items():
            if is_given:
                raise UserError(f"streaming and {name}: {why}")

    def spec(self, seed: int, max_seq_len: int, **more) -> DataSpec:
        """What the data room needs to know."""
        return DataSpec(
            data_path=tuple(self.data_path),
            data_split=self.data_split,
            data_output_path=self.data_output_path,
            seed=seed,
            max_seq_len=max_seq_len,
            max_train_samples=self.max_train_samples,
            max_eval_samples=self.max_eval_samples,
            reading=Reading(tuple(self.dataset_columns), self.dataset_function),
            workers=self.preprocessing_num_workers,
            streaming=self.streaming,
            **more,
        )


@dataclass(frozen=True)
class BatchArguments(Settings):
    """Batch sizes and length limit of steps 1 and 2."""

    model_name_or_path: str = setting(MISSING, "model folder or hub id")
    per_device_train_batch_size: int = setting(16, "rows per device and micro-batch")
    per_device_eval_batch_size: int = setting(16, "rows per device in evaluation")
    max_seq_len: int = setting(512, "tokens of prompt and answer together")
    eval_interval: int = setting(0, "optimizer steps between evaluations; 0: per epoch only")
    max_steps: int = setting(0, "stop after so many optimizer steps; 0: after the data")
    max_tokens_per_batch: int | None = setting(
        None,
        "training batches of as many rows as fit, padded, in so many tokens per device, in place "
        "of --per_device_train_batch_size",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self)[1:4]:
            if getattr(self, field.name) < 1:
                raise UserError(f"{field.name} is {getattr(self, field.name)}: give at least 1")
        if self.max_steps < 0:
            raise UserError(f"max_steps is {self.max_steps}: give 0 (no limit) or more")
        self.grouping()

    @property
    def own_batching(self) -> str | None:
        """The flag that asks for batches other than by rows."""
        return None if self.max_tokens_per_batch is None else "max_tokens_per_batch"

    def grouping(self, sequences: int = 1, packing: bool = False) -> Grouping:
        """How training rows become batches; `sequences` is how many a row becomes.

        Raises:
            UserError: too few tokens for the longest row, or two ways at once.
        """
        limit, longest = self.max_tokens_per_batch, sequences * self.max_seq_len
        if limit is not None and limit < longest:
            of_what = "a pair" if sequences == 2 else "a row"
            raise UserError(
                f"max_tokens_per_batch is {limit}: {of_what} may have {longest} tokens; give at "
                "least that, or a smaller max_seq_len"
            )
        if packing and limit is not None:
            raise UserError(
                "packing and max_tokens_per_batch: packed rows are all of max_seq_len already; "
                "drop one, per_device_train_batch_size counts packed rows"
            )
        if packing:
            return Packed(self.per_device_train_batch_size, self.max_seq_len)
        if limit is not None:
            return ByTokens(limit, sequences)
        return ByRows(self.per_device_train_batch_size)


@dataclass(frozen=True)
class EvaluationArguments(Settings):
    """Flags of scripts that load one model and evaluate it."""

    model_name_or_path: str = setting(MISSING, "model folder or hub id")
    batch_size: int = setting(16, "rows per batch")
    max_seq_len: int = setting(512, "tokens of prompt and answer together")
    dtype: str = setting(
        "auto", "auto is bf16 where the device has it", choices=("auto", "fp32", "bf16", "fp16")
    )
    seed: int = setting(1234, "seed of splits; as in training")
    add_eot_token: bool = setting(False, "end answers with --eot_token instead of the eos")
    eot_token: str = setting("<|endoftext|>", "the token of --add_eot_token")

    @property
    def answer_end(self) -> str | None:
        """The token that ends answers in place of the tokenizer's eos."""
        return self.eot_token if self.add_eot_token else None
