"""Look at data as training would see it, before training on it.

    python -m dschat.data inspect --data_path ./pairs.jsonl --model_name_or_path ./model
    python -m dschat.data inspect --data_path ./pairs.jsonl --model_name_or_path ./model --phase 1

For each phase (1 supervised fine-tuning, 2 preference pairs, 3 PPO prompts): what became of every
row by source, lengths, how much padding is left, and a few rows with the trained tokens marked, in
colour on a terminal (unless NO_COLOR is set), else in [[ ]]. The tokenised sets are those that
training uses, and are kept for it. No model is loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass

import datasets
from transformers import PreTrainedTokenizerBase

from dschat.config.cli import parse, run_cli
from dschat.config.unused import tell_unused
from dschat.data.config import SHORTEST, BatchConfig, SFTDataConfig
from dschat.data.datasets import PromptData, create_prompt_dataset
from dschat.data.inspection import Marks, histogram, padding_lines, render, sequence_lengths
from dschat.data.report import PHASE_NAMES
from dschat.errors import UserError
from dschat.settings import Settings, group, setting
from dschat.text.formats import set_format
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.utils.printable import printable

TOKENS = 8192  # of a batch, unless a number is given


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

    def tokenised(self, tokenizer: PreTrainedTokenizerBase, phase: int) -> PromptData:
        """Make the set of a phase that training would use."""
        return create_prompt_dataset(
            self.data,
            tokenizer,
            phase,
            seed=self.seed,
            max_seq_len=self.max_seq_len,
            max_prompt_len=self.max_prompt_seq_len,
        )


def inspect(
    settings: InspectSettings, tokenizer: PreTrainedTokenizerBase, marks: Marks
) -> Iterator[str]:
    """The lines about each phase; one that the data cannot serve says why, if all were asked for.

    Raises:
        UserError: bad input, or data that no phase can use.
    """
    refused = 0
    for phase in (1, 2, 3) if settings.phase is None else (settings.phase,):
        yield f"== phase {phase}, {PHASE_NAMES[phase]} =="
        try:
            yield from _phase_lines(settings, phase, tokenizer, marks)
        except UserError as error:
            if settings.phase is not None:
                raise
            refused += 1
            yield printable(f"cannot be made of this data: {error}")
        yield ""
    if refused == len(PHASE_NAMES):
        raise UserError("no phase can be made of this data; fix what is said above")


def _phase_lines(
    settings: InspectSettings, phase: int, tokenizer: PreTrainedTokenizerBase, marks: Marks
) -> Iterator[str]:
    data = settings.tokenised(tokenizer, phase)
    assert isinstance(data.train, datasets.Dataset)  # streaming is refused
    yield from map(printable, data.report.lines())
    yield ""
    lengths = sequence_lengths(data.train, phase)
    yield from histogram(lengths)
    yield ""
    longest = settings.max_prompt_seq_len if phase == 3 else settings.max_seq_len
    batch, tokens = settings.per_device_train_batch_size, settings.max_tokens_per_batch
    if tokens is not None and phase != 3:  # stop where training would
        BatchConfig(max_seq_len=longest, max_tokens_per_batch=tokens).sampler(len(lengths))
    yield from padding_lines(lengths, phase, batch, tokens or TOKENS, longest)
    # From all over the set, always the same.
    shown = min(settings.samples, len(data.train))
    for number in range(shown):
        row = number * len(data.train) // shown
        for label, text in render(data.train[row], phase, tokenizer, marks):
            yield ""
            yield f"-- row {row + 1} of {len(data.train)}: {label}"
            yield text


def main(argv: list[str] | None = None) -> None:
    """Print what `inspect` finds."""
    command, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command != "inspect":
        found = f"unknown command {command}" if command else "no command"
        raise UserError(f"{found}; give: python -m dschat.data inspect --data_path ...")
    settings = parse(InspectSettings, flags, __doc__)
    tell_unused(settings)
    tokenizer = load_hf_tokenizer(
        settings.model_name_or_path,
        add_eot_token=settings.add_eot_token,
        eot_token=settings.eot_token,
    )
    asked = settings.data.prompt_format
    set_format(tokenizer, asked, teaches=True, end_is_given=settings.add_eot_token)
    marks = Marks.of(sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    for line in inspect(settings, tokenizer, marks):
        print(line)


if __name__ == "__main__":
    run_cli(main)
