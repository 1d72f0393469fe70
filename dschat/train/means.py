"""Means of figures that are summed over different terms: pairs, tokens of one side."""

from __future__ import annotations

from dataclasses import dataclass, field

from dschat.utils.distributed import all_reduce_sum


@dataclass
class Means:
    """Sums and numbers of terms, by the name of the figure."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, other: Means) -> None:
        """Add the sums and the terms of another."""
        for mine, more in ((self.sums, other.sums), (self.counts, other.counts)):
            for name, value in more.items():
                mine[name] = mine.get(name, 0.0) + value

    def over_ranks(self) -> Means:
        """Sum over all ranks, which have the same names in the same order."""
        names = list(self.sums)
        totals = all_reduce_sum([part[n] for part in (self.sums, self.counts) for n in names])
        sums, counts = totals[: len(names)], totals[len(names) :]
        return Means(
            dict(zip(names, sums, strict=True)),
            dict(zip(names, counts, strict=True)),
        )

    def values(self) -> dict[str, float]:
        """Divide; 0 without terms."""
        return {name: total / max(self.counts[name], 1.0) for name, total in self.sums.items()}
