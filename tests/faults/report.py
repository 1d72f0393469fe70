"""Counts of verdicts by kind of fault and by layout, and the tables of them."""

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
# By number of ranks and stage of ZeRO.
LAYOUTS = {
    (("1 rank", "2 ranks")[ranks - 1], stage): f"z{stage}-r{ranks}"
    for ranks in (1, 2)
    for stage in (0, 2, 3)
}


def row_of(case: str) -> str:
    """Row of the table that a case counts in."""
    _, kind, *words = case.split()
    name = f"{kind} {words[0]}" if words else kind
    return name if name in ROWS else kind


def counts(verdicts: Sequence[dict]) -> dict[str, dict]:
    """Count faults that took place and what came of them, by row; and by program and layout.

    Returns:
        `rows`; `layouts`: kills and other faults by program and by "z2-r1"; `commits`: sorted.
    """
    rows, layouts = {}, {}
    for row in ROWS:
        mine = [v for v in verdicts if row_of(v["case"]) == row]
        good = [v for v in mine if not v["complaints"]]
        rows[row] = {
            "cases": len(mine),
            "starts": sum(v["starts"] for v in mine),
            "faults": sum(v["faults"] for v in mine),
            "results": dict(sorted(Counter(v["result"] for v in good).items())),
            "failed": len(mine) - len(good),
        }
    for verdict in verdicts:
        name, kind, *_ = verdict["case"].split()
        program, _, layout = name.partition("-z")
        cell = layouts.setdefault(program, {}).setdefault(f"z{layout}", [0, 0])
        cell[kind != "kill"] += verdict["faults"]
    commits = sorted({verdict.get("commit", "unknown") for verdict in verdicts})
    return {"rows": rows, "layouts": dict(sorted(layouts.items())), "commits": commits}


def table(found: dict[str, dict]) -> str:
    """The counts as two tables in Markdown."""
    lines = ["| fault | cases | faults | starts | outcome | failed |", "| --- |" + " --- |" * 5]
    for row, entry in found["rows"].items():
        if not entry["cases"]:
            continue
        outcome = ", ".join(f"{count} {result}" for result, count in entry["results"].items())
        numbers = f"{entry['cases']} | {entry['faults']} | {entry['starts']}"
        lines.append(f"| {ROWS[row]} | {numbers} | {outcome or '–'} | {entry['failed']} |")
    if not found["layouts"]:
        return "\n".join(lines)
    heads = " | ".join(f"{ranks}, ZeRO {stage}" for ranks, stage in LAYOUTS)
    lines += ["", f"| kills + other faults | {heads} |", "| --- |" + " --- |" * len(LAYOUTS)]
    for program, cells in found["layouts"].items():
        sums = [cells.get(name, (0, 0)) for name in LAYOUTS.values()]
        lines.append(f"| {program} | " + " | ".join(f"{k} + {other}" for k, other in sums) + " |")
    return "\n".join(lines)
