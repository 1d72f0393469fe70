"""The page of a run while it goes on, OUTPUT/report.html, and its models' cards at the end."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from dschat.report.html import put_in_place
from dschat.report.records import DESCRIPTION
from dschat.settings import Settings, flag_values
from dschat.train import phases
from dschat.utils.distributed import print_rank_0
from dschat.utils.printable import step_of_start

SHARE = 100  # of the run's time, one part at most goes into its page
FIRST = 60.0  # seconds before there is one: a run that has ended by then makes it once
VERSIONS = ("torch", "transformers", "deepspeed", "datasets", "tokenizers")
PROGRAMS = {  # by the settings' class
    "SFTSettings": "sft",
    "RewardSettings": "reward",
    "DPOSettings": "dpo",
    "RLHFSettings": "ppo",
}


class RunPage:
    """Describes the run in OUTPUT/run.json, and makes its page at evaluations and at its end.

    Args:
        settings: of the run; without them nothing is described.
    """

    def __init__(self, output_dir: str | Path, settings: Settings | None):
        self.folder = Path(output_dir)
        self._next = time.monotonic() + FIRST  # earliest time of the next one
        self._described = None if settings is None else description(settings)
        self._describe()

    def _describe(self) -> None:
        """Write what the run is, and where its time has gone so far."""
        if self._described is not None:
            said = self._described | {"phases": phases.table()}
            text = json.dumps(said, indent=2, default=str, ensure_ascii=False)
            put_in_place(self.folder / DESCRIPTION, f"{text}\n".encode())

    def refresh(self) -> None:
        """Make the page, unless that would take more than its share of the time."""
        if time.monotonic() >= self._next:
            self._make()

    def finish(self) -> None:
        """Make the page of the whole run and its models' cards, and say where the page is."""
        from dschat.report.card import write_cards

        step_of_start("the model is written; drawing the report")
        page = self._make()
        if page is None:
            return
        print_rank_0(f"curves, warnings and answers: {page}")
        try:
            write_cards(self.folder)
        except Exception as error:
            print_rank_0(f"no model card: {type(error).__name__}: {error}")

    def _make(self) -> Path | None:
        """Make the page; what hinders it is said, and the run goes on without."""
        from dschat.report.page import write_page

        start, page = time.monotonic(), None
        try:
            self._describe()
            page = write_page(self.folder)
        except Exception as error:  # a picture is worth no run
            print_rank_0(f"no report.html: {type(error).__name__}: {error}")
        end = time.monotonic()
        self._next = end + SHARE * (end - start)
        return page


def description(settings: Settings) -> dict[str, Any]:
    """Return program, settings and versions as JSON values."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    versions |= {name: importlib.metadata.version(name) for name in VERSIONS}
    program = PROGRAMS.get(type(settings).__name__, type(settings).__name__)
    return {"program": program, "settings": flag_values(settings), "versions": versions}
