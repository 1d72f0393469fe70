"""Show answers of two or three models side by side, on a page of one file.

    dschat compare ./sft ./ppo --prompts ./test.jsonl --reward_model ./reward
    dschat compare ./sft answers.jsonl --prompts ./test.jsonl --output other.html
    dschat compare --live ./sft ./ppo

The page needs no network and reads without a script; with one it filters, sorts, hides who wrote
what, and counts your votes. With --live it is a page on this machine where you type, and all models
answer as you watch; it needs: pip install 'dschat[live]'.

1. read the prompts; check every model and file
2. collect all answers, one to each prompt, and their rewards
3. write the page
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from dschat.config.answering import CompareSettings
    from dschat.config.cli import check_flags

    check_flags(CompareSettings, __doc__)

import os
from collections.abc import Sequence
from pathlib import Path

from dschat.compare.page import Column, write_page
from dschat.config.answering import CompareSettings
from dschat.config.cli import parse, run_cli
from dschat.config.unused import tell_unused
from dschat.errors import UserError
from dschat.models.reward_head import read_head
from dschat.rlhf.candidates import Candidates, read_prompts
from dschat.rlhf.judges import JudgeLimits, RewardJudge, check_judge, load_judge
from dschat.utils.files import disk_errors_named
from dschat.utils.printable import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page, or serve the one where one types."""
    settings = parse(CompareSettings, argv, __doc__)
    tell_unused(settings)
    if settings.live:
        from dschat.compare.live import serve

        serve(settings)
        return
    assert settings.prompts is not None  # the settings have checked it
    limits, judge_limits = settings.limits()

    # 1. all that can be wrong
    output = Path(settings.output)
    check_output(output)
    if settings.reward_model is not None:
        check_reward_model(settings.reward_model, judge_limits)
    prompts = read_prompts(settings.prompts, settings.max_prompts, settings.read, "prompts")
    candidates = Candidates(settings.models, "models", prompts, limits, settings.read)

    # 2. answers and rewards
    named = zip(settings.models, candidates.answers(), strict=True)
    columns = [Column(name, answers) for name, answers in named]
    if settings.reward_model is not None:
        judge = load_judge(settings.reward_model, judge_limits)
        assert isinstance(judge, RewardJudge)
        for column in columns:
            column.rewards = judge.scores(prompts, column.answers)[0].tolist()

    # 3. the page
    with disk_errors_named(f"output {output}", lambda: "give another file", output.name):
        write_page(output, settings, prompts, columns)
    print(printable(f"{len(prompts)} prompts side by side: {output}"))


def check_output(path: Path) -> None:
    """Refuse a page that cannot be written, before any model answers."""
    folder = path.parent
    if path.is_dir() or path.suffix != ".html":
        raise UserError(f"output {path}: give the name of a file that ends with .html")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"output {path}: {folder} is no folder that can be written; give another")


def check_reward_model(name: str, limits: JudgeLimits) -> None:
    """Refuse a model without a reward head, or one that cannot be loaded."""
    check_judge(name, limits)
    if read_head(name) is None:
        raise UserError(
            f"reward_model {name}: has no reward head; give a folder that dschat reward wrote"
        )


if __name__ == "__main__":
    run_cli(main)
