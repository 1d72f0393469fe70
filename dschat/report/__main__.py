"""Make the page of a run again: curves, answers and settings in OUTPUT/report.html.

python -m dschat.report output/step3-models
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Make the page of each folder; print where it is."""
    parser = argparse.ArgumentParser(prog="python -m dschat.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output", nargs="+", type=Path, help="output folder of a run")
    folders = parser.parse_args().output
    from dschat.report.page import write_page
    from dschat.report.records import METRICS
    from dschat.utils.printable import printable

    for folder in folders:
        try:
            print(printable(str(write_page(folder))))
        except FileNotFoundError as error:
            line = f"error: {folder}: no run has written {error.filename or METRICS} there"
            print(printable(line), file=sys.stderr)
            sys.exit(2)
        except (OSError, ValueError, KeyError) as error:
            print(printable(f"error: {folder}: {error}"), file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
