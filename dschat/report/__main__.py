"""Make the page of a run again: curves, warnings, answers and settings in OUTPUT/report.html.

    dschat report output/step3-models
    dschat report output/step3-models --base           # or: --base NAME_OF_A_MODEL

With --base, of step 3 alone, the model that step 1 began with answers the prompts of the page,
which then shows base, SFT and PPO side by side; `dschat run` does so at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dschat.config.cli import run_cli
from dschat.config.help import OneLineParser, program
from dschat.errors import UserError, brief
from dschat.report.page import write_page
from dschat.report.records import METRICS
from dschat.utils.printable import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Make the page of each folder, and print where it is."""
    parser = OneLineParser(__doc__, prog=program("dschat.report"))
    parser.add_argument("output_dir", nargs="+", type=Path, help="output folder of a run")
    parser.add_argument(
        "--base",
        nargs="?",
        const="",
        help="let the model answer that step 1 began with, or this one",
    )
    args = parser.parse_args(argv)
    for folder in args.output_dir:
        if not (folder / METRICS).is_file():
            raise UserError(f"{folder}: holds no {METRICS}; give the output folder of a run")
        if args.base is not None:
            from dschat.rlhf.base_answers import base_of, write_base_answers  # takes seconds

            write_base_answers(folder, args.base or base_of(folder))
        try:
            print(printable(str(write_page(folder))))
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from error
        except Exception as error:  # whatever a damaged record leads to
            reason = brief(error, with_type=not isinstance(error, ValueError))
            raise UserError(f"{folder}: what the run wrote is damaged: {reason}") from error


if __name__ == "__main__":
    run_cli(main)
