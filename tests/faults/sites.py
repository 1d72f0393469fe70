"""Places in a run where it changes the disk, from the trace of one that nothing happened to."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Parts of a path that differ between runs: digests, random names, process ids, and steps.
_VARYING = (
    (re.compile(r"[0-9a-f]{8,}"), "*"),
    (re.compile(r"step-\d+"), "step-*"),
    (re.compile(r"/tmp\w{8}\b"), "/tmp*"),
    (re.compile(r"/\.tmp\w{6}\b"), "/.tmp*"),
    (re.compile(r"\.counts/\d+"), ".counts/*"),
)


@dataclass(frozen=True)
class Call:
    """A line of the trace."""

    number: int
    operation: str
    path: str
    size: int
    is_aim: bool

    @property
    def site(self) -> str:
        """Pattern of "operation path" that matches this call in every run."""
        path = re.sub(r"([\[\]?])", r"[\1]", self.path)
        for pattern, star in _VARYING:
            path = pattern.sub(star, path)
        return f"{self.operation} {path}"


def read_trace(path: Path) -> list[Call]:
    """Calls of a run in their order."""
    calls = []
    for line in path.read_text().splitlines():
        number, _pid, operation, size, name, mark = line.split("\t")
        calls.append(Call(int(number), operation, name, int(size), mark == "<"))
    return calls


def sites_of(calls: list[Call]) -> dict[str, int]:
    """Each site with its number of calls, in the order of the first."""
    return dict(Counter(call.site for call in calls))


def draw_site(random_: random.Random, sites: dict[str, int]) -> tuple[str, int]:
    """Draw a site, all alike likely, and one of its calls: rare calls matter as well."""
    site = random_.choice(list(sites))
    return site, random_.randint(1, sites[site])


def in_loop(sites: dict[str, int]) -> dict[str, int]:
    """Sites of the training loop: figures and checkpoints."""
    return {site: n for site, n in sites.items() if "/checkpoints" in site or "metrics" in site}


def published(calls: list[Call]) -> int:
    """Newest step whose checkpoint got its name, leaving the call that was aimed at in doubt."""
    name = re.compile(r".*/checkpoints/step-(\d+)")
    done = (c for c in calls if c.operation == "rename" and not c.is_aim)
    return max((int(m[1]) for c in done if (m := name.fullmatch(c.path))), default=0)
