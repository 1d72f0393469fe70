"""Counts of verdicts by kind of fault, and the table of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

ROWS = {
    "kill": "SIGKILL of all ranks",
    "error ENOSPC": "disk full (ENOSPC)",
    "error EIO": "disk broken (EIO)",
    "error EROFS": "disk read-only (EROFS)",
    "error EDQUOT": "quota used up (EDQUOT)",
    "signal": "SIGTERM, SIGINT, SIGUSR1",
    "signal-one": "SIGTERM to one of two ranks",
    "lost-rank": "SIGKILL of one of two ranks",
    "damage checkpoint": "file of the newest checkpoint",
    "damage only-checkpoint": "file of the only checkpoint",
    "damage model": "file of the model folder",
    "damage cache": "file of the tokenised data",
}


def row_of(case: str) -> str:
    """Row of the table that a case counts in."""
    _, kind, *words = case.split()
    name = f"{kind} {words[0]}" if words else kind
    return name if name in ROWS else kind


def counts(verdicts: Sequence[dict]) -> dict[str, dict]:
    """Faults that took place, and what came of them, by row."""
    found = {}
    for row in ROWS:
        mine = [v for v in verdicts if row_of(v["case"]) == row]
        good = [v for v in mine if not v["complaints"]]
        found[row] = {
            "cases": len(mine),
            "starts": sum(v["starts"] for v in mine),
            "faults": sum(v["faults"] for v in mine),
            "results": dict(sorted(Counter(v["result"] for v in good).items())),
            "failed": len(mine) - len(good),
        }
    return found


def table(found: dict[str, dict]) -> str:
    """The counts as Markdown."""
    lines = ["| fault | cases | faults | starts | outcome | failed |", "| --- |" + " --- |" * 5]
    for row, entry in found.items():
        if not entry["cases"]:
            continue
        outcome = ", ".join(f"{count} {result}" for result, count in entry["results"].items())
        numbers = f"{entry['cases']} | {entry['faults']} | {entry['starts']}"
        lines.append(f"| {ROWS[row]} | {numbers} | {outcome or '–'} | {entry['failed']} |")
    return "\n".join(lines)
