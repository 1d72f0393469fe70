"""Merge an adapter into its base: a folder that loads without PEFT and without the base.

    python -m dschat.merge ./output/adapter ./merged
    python -m dschat.merge some-name/some-adapter ./merged --dtype bf16

The adapter may be this package's or PEFT's own, of a causal language model or of a reward model (a
sequence classifier with one label); one that does not say of which is a reward model's where it
holds a `score` head. The sum is computed in fp32 and cast once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dschat.config.cli import run_cli
from dschat.config.help import OneLineParser, program
from dschat.errors import UserError
from dschat.lazy import torch
from dschat.utils.distributed import Distributed
from dschat.utils.printable import printable

if TYPE_CHECKING:
    from dschat.utils.module.model_source import ModelSource


def check_target(source: ModelSource, output_dir: str, replaces: bool) -> None:
    """Stop where the output folder must not be written; put back what an ended writer left there.

    Raises:
        UserError: it holds what the merge reads, a model that nothing `replaces`, or no room.
    """
    from dschat.models.placing import repair
    from dschat.models.save import check_output_dir
    from dschat.models.save_plan import holds_model

    target, base = Path(output_dir).resolve(), Path(source.base).expanduser().resolve()
    for folder in (*(part.folder for part in source.adapters), base):
        if folder.is_relative_to(target):
            raise UserError(
                f"output folder {output_dir}: holds {folder}, which the merge reads; give another"
            )
    check_output_dir(output_dir)
    for line in repair(output_dir):
        print(line)
    if holds_model(target) and not replaces:
        raise UserError(
            f"output_dir {output_dir}: holds a finished model; give another, or "
            "--overwrite_output_dir to replace it"
        )


def merge(
    adapter: str, output_dir: str, dtype: str = "auto", overwrite_output_dir: bool = False
) -> None:
    """Write the merged model folder, tokenizer included; it gets its name when it is complete.

    Args:
        adapter: a folder or hub id. dtype: fp32, bf16, fp16, or auto for the base's own.
        overwrite_output_dir: replace a model that is there.

    Raises:
        UserError: no adapter there, its base is gone or does not fit, or an unusable output folder.
    """
    from dschat.models.causal_lm import create_hf_model
    from dschat.models.config import load_config
    from dschat.models.reward_model import create_critic_model
    from dschat.models.reward_statistics import (
        EVALUATION_FILE,
        VALUE_FILE,
        read_evaluation,
        read_statistics,
    )
    from dschat.models.save import save_hf_format
    from dschat.text.tokenizer import load_hf_tokenizer
    from dschat.train.engine import torch_dtype
    from dschat.utils.module.model_source import resolve_model

    source = resolve_model(adapter)
    if not source.adapters:
        raise UserError(
            f"{adapter}: is no adapter (it has no adapter_config.json); give the folder or hub id "
            "of one"
        )
    check_target(source, output_dir, overwrite_output_dir)
    own = load_config(adapter).dtype
    saved = own if isinstance(own, torch.dtype) else torch.float32
    tokenizer = load_hf_tokenizer(adapter)
    is_reward = any(part.is_reward for part in source.read_adapters())
    create = create_critic_model if is_reward else create_hf_model
    model = create(adapter, tokenizer, saved if dtype == "auto" else torch_dtype(dtype))
    alone = Distributed(0, 1, 0, torch.device("cpu"))
    statistics, files = None, {}
    if is_reward:
        statistics = read_statistics(adapter)
        if (report := read_evaluation(adapter)) is not None:
            files[EVALUATION_FILE] = (json.dumps(report, indent=1) + "\n").encode()
        model.value_scaling = read_statistics(adapter, VALUE_FILE)
    save_hf_format(model, tokenizer, output_dir, alone, statistics=statistics, files=files)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and merge."""
    parser = OneLineParser(__doc__, prog=program("dschat.merge"))
    parser.add_argument("adapter", help="folder or hub id of an adapter")
    parser.add_argument("output_dir", help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the merged weights; auto is the base's own (default: auto)",
    )
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace a model that is there"
    )
    args = parser.parse_args(argv)
    merge(args.adapter, args.output_dir, args.dtype, args.overwrite_output_dir)
    print(printable(f"{args.adapter} merged into {args.output_dir}"))


if __name__ == "__main__":
    run_cli(main)
