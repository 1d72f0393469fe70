"""Rules that stand in for a reward model: `--reward_function benchmarks.rewards:plain`."""

from __future__ import annotations

USUAL_LENGTH = 5.0  # characters a word in English prose, punctuation with them
FEWEST_WORDS = 5
LOWEST = -1.0


def plain(prompt: str, answer: str) -> float:
    """Short words: 5 minus the mean length of a word in characters, at least -1.

    An answer of fewer than five words gets -1.
    """
    words = answer.split()
    if len(words) < FEWEST_WORDS:
        return LOWEST
    return max(LOWEST, USUAL_LENGTH - sum(map(len, words)) / len(words))
