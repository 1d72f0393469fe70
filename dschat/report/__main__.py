"""Make the page of a run again: curves, warnings, answers and settings in OUTPUT/report.html.

python -m dschat.report output/step3-models
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
    for folder in parser.parse_args(argv).output_dir:
        if not (folder / METRICS).is_file():
            raise UserError(f"{folder}: holds no {METRICS}; give the output folder of a run")
        try:
            print(printable(str(write_page(folder))))
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from error
        except Exception as error:  # whatever a damaged record leads to
            reason = brief(error, with_type=not isinstance(error, ValueError))
            raise UserError(f"{folder}: what the run wrote is damaged: {reason}") from error


if __name__ == "__main__":
    run_cli(main)
