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
    "damage output": "file that a resumed run appends to",
}
EVERY_FILE = "every-file"
SWEEPS = {
    "checkpoint": "newest checkpoint",
    "model": "model folder",
    "cache": "tokenised data",
    "output": "what a resumed run appends to",
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
        `rows`; `layouts`: kills and other faults by program and by "z2-r1"; `every_file`: damages
        of files without a start for each, by target; `commits`: sorted.
    """
    rows, layouts, sweeps = {}, {}, {}
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
    for target in SWEEPS:
        mine = [v for v in verdicts if v["case"].split()[1:] == [EVERY_FILE, target]]
        total: Counter[str] = Counter()
        for verdict in mine:
            total.update(verdict["sweep"])
        if mine:
            sweeps[target] = {"folders": len(mine), **total}
    for verdict in verdicts:
        if f" {EVERY_FILE} " in verdict["case"]:
            continue
        name, kind, *_ = verdict["case"].split()
        program, _, layout = name.partition("-z")
        cell = layouts.setdefault(program, {}).setdefault(f"z{layout}", [0, 0])
        cell[kind != "kill"] += verdict["faults"]
    commits = sorted({verdict.get("commit", "unknown") for verdict in verdicts})
    by_layout = dict(sorted(layouts.items()))
    return {"rows": rows, "layouts": by_layout, "every_file": sweeps, "commits": commits}


def table(found: dict[str, dict]) -> str:
    """The counts as tables in Markdown: by fault, by layout, and of every file."""
    lines = ["| fault | cases | faults | starts | outcome | failed |", "| --- |" + " --- |" * 5]
    for row, entry in found["rows"].items():
        if not entry["cases"]:
            continue
        outcome = ", ".join(f"{count} {result}" for result, count in entry["results"].items())
        numbers = f"{entry['cases']} | {entry['faults']} | {entry['starts']}"
        lines.append(f"| {ROWS[row]} | {numbers} | {outcome or '–'} | {entry['failed']} |")
    lines += _layouts(found["layouts"]) if found["layouts"] else []
    lines += _every_file(found["every_file"]) if found.get("every_file") else []
    return "\n".join(lines)


def _layouts(found: dict[str, dict]) -> list[str]:
    heads = " | ".join(f"{ranks}, ZeRO {stage}" for ranks, stage in LAYOUTS)
    lines = ["", f"| kills + other faults | {heads} |", "| --- |" + " --- |" * len(LAYOUTS)]
    for program, cells in found.items():
        sums = [cells.get(name, (0, 0)) for name in LAYOUTS.values()]
        lines.append(f"| {program} | " + " | ".join(f"{k} + {other}" for k, other in sums) + " |")
    return lines


def _every_file(found: dict[str, dict]) -> list[str]:
    names = ("folders", "files", "damages", "found", "same content", "undetected")
    lines = ["", f"| every file of | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for target, counted in found.items():
        damages = sum(counted.get(name, 0) for name in names[3:])
        numbers = {**counted, "damages": damages}
        cells = " | ".join(f"{numbers.get(name, 0):,}" for name in names)
        lines.append(f"| {SWEEPS[target]} | {cells} |")
    return lines
