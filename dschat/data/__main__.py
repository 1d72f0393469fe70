"""Look at data as training would see it, before training on it.

    dschat inspect --data_path ./pairs.jsonl --model_name_or_path ./model
    python -m dschat.data inspect --config data.yaml --phase 1

For each phase (1 supervised fine-tuning, 2 preference pairs, 3 PPO prompts): what became of every
row by source, lengths, how much padding is left, and a few rows with the trained tokens marked, in
colour on a terminal (unless NO_COLOR is set), else in [[ ]]. The tokenised sets are those that
training uses, and are kept for it. No model is loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dschat.config.cli import parse, run_cli
from dschat.config.programs import InspectSettings
from dschat.config.unused import tell_unused
from dschat.data.batch_config import BatchConfig
from dschat.data.report import PHASE_NAMES
from dschat.errors import UserError
from dschat.text.formats import set_format
from dschat.utils.printable import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dschat.data.datasets import PromptData
    from dschat.data.inspection import Marks

TOKENS = 8192  # of a batch, unless a number is given


def tokenised(
    settings: InspectSettings, tokenizer: PreTrainedTokenizerBase, phase: int
) -> PromptData:
    """Make the set of a phase that training would use."""
    from dschat.data.datasets import create_prompt_dataset

    return create_prompt_dataset(
        settings.data,
        tokenizer,
        phase,
        seed=settings.seed,
        max_seq_len=settings.max_seq_len,
        max_prompt_len=settings.max_prompt_seq_len,
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
    import datasets

    from dschat.data.inspection import histogram, padding_lines, render, sequence_lengths

    data = tokenised(settings, tokenizer, phase)
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
    from dschat.data.inspection import Marks
    from dschat.text.tokenizer import load_hf_tokenizer

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
