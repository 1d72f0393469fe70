"""Calibrate the warnings of PPO: histories of made-up and of real runs, and what is said of them.

    python -m benchmarks.ppo_monitor [RUN ...] [--seeds 200]

RUN is an output folder of step 3, or its metrics.jsonl, written with `--log_every 1`. Without any,
made-up histories alone are counted: for each kind of trouble, how often its own cause comes first,
how many iterations after it begins, and what else is said; for healthy ones, how often anything is.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dschat.errors import UserError
from dschat.rlhf.ppo_health import HealthMonitor

ITERATIONS, BEGINNING = 40, 2  # trouble begins with iteration 2: the first is the reference
NOT_FINITE = "not finite"
WHILE = 10  # iterations that a trouble waits for after something good
LENGTH_SPREAD = 0.25  # of the length: an answer's standard deviation
Figures = dict[str, float]


@dataclass(frozen=True)
class Trouble:
    """What happens to a healthy run, and the rule that should say so first."""

    rule: str | None
    change: Callable[[float], Figures]  # iterations since it began -> figures
    from_the_start: bool = False


def far(nats: float, reward: float, **others: float) -> Callable[[float], Figures]:
    """A policy that is far away from its first update on."""
    return lambda t: {"kl_per_token": nats, "kl_k3": nats, "reward": reward, **others}


TROUBLES = {
    "healthy": Trouble(None, lambda t: {}),
    "slow": Trouble(None, lambda t: {"kl_per_token": 2e-6 * t * t, "kl_k3": 2e-6 * t * t}),
    "ran away": Trouble(
        "ran away", far(10.0, -3.0, entropy=2.8, clip_fraction=0.9, explained_variance=-1.0)
    ),
    "ran away, up by chance": Trouble("ran away", far(8.0, 1.0, entropy=4.0, ended=0.0)),
    "drifts away": Trouble(
        "ran away", lambda t: {"kl_per_token": 0.1 * t, "kl_k3": 0.1 * t, "reward": 0.0}
    ),
    "reward falls": Trouble("reward fell", lambda t: {"reward": -0.1 * t}),
    "nothing learnt": Trouble(
        "standstill", lambda t: {"kl_per_token": 1e-6, "kl_k3": 1e-6, "reward": 0.0}
    ),
    "answers shrink": Trouble("answers shrank", lambda t: {"answer_length": max(100 - 10 * t, 2)}),
    "answers grow": Trouble(
        "answers grew",
        lambda t: {"answer_length": min(100 + 15 * t, 250), "ended": max(0.9 - 0.06 * t, 0.3)},
    ),
    "gamed": Trouble(
        "gamed reward",
        lambda t: {
            "kl_per_token": min(0.2 * t, 4.0),
            "kl_k3": min(0.2 * t, 4.0),
            "reward": min(0.4 * t, 8.0),
            "entropy": 1.4 * 0.9**t,
        },
    ),
    "no scores": Trouble("no scores", lambda t: {"unscored": 0.95, "reward": 0.0}),
    "masked": Trouble("masked answers", lambda t: {"masked": 0.95, "ended": 0.0}),
    "clipped": Trouble("clipped rewards", lambda t: {"reward_clipped": 0.4}, from_the_start=True),
    "constant": Trouble(
        "equal rewards", lambda t: {"reward": 0.0, "reward_std": 0.0}, from_the_start=True
    ),
    "equal within prompts": Trouble(
        "equal within prompts", lambda t: {"frac_reward_zero_std": 0.97}
    ),
    "filtered": Trouble("negative KL", lambda t: {"kl_per_token": -0.05, "kl_k3": 0.02}),
    "another engine": Trouble("foreign answers", lambda t: {"decode_gap": 0.4}),
    "long updates": Trouble("long updates", lambda t: {"clip_fraction": 0.5}),
    "collapse": Trouble("entropy collapse", lambda t: {"entropy": 0.05, "reward_std": 0.0}),
    "collapse after a gain": Trouble(
        "entropy collapse",
        lambda t: {
            "entropy": 1.4 * max(1 - 0.05 * t, 0.03),
            "reward": min(0.1 * t, 1.2) - 0.3 * max(t - 16, 0) if t < 21 else 0.0,
        },
    ),
    "learns what is right": Trouble(
        None,
        lambda t: {
            "entropy": 1.4 * max(0.9**t, 0.03),
            "reward": 1.25 * (1 - 0.85**t),
            "reward_std": max(1 - 0.05 * t, 0.4),
            "frac_reward_zero_std": min(0.1 + 0.02 * t, 0.8),
        },
    ),
    "no ends": Trouble("no ends", lambda t: {"ended": 0.0}),
    "blind critic": Trouble("blind critic", lambda t: {"explained_variance": -0.3}),
    "constant critic": Trouble("blind critic", lambda t: {"explained_variance": (t % 2) * 1e-3}),
    "critic goes blind": Trouble(
        "blind critic", lambda t: {"explained_variance": 0.3 if t < WHILE else -0.3}
    ),
    "nan": Trouble(NOT_FINITE, lambda t: {"reward": float("nan"), "kl_per_token": float("nan")}),
}


def history(trouble: Trouble, draw: random.Random, answers: int = 64) -> Iterator[Figures]:
    """Figures of a healthy run with noise, and of its trouble."""
    error = answers**-0.5
    for iteration in range(1, ITERATIONS + 1):
        t = max(iteration - BEGINNING + 1, 0)
        kl = 0.2 * (1 - 0.9**t)
        figures = {
            "reward": 1.2 * (1 - 0.9**t), "reward_std": 1.0, "reward_clipped": 0.01,
            "answers": float(answers), "answer_length": 100.0, "ended": 0.9,
            "kl_per_token": kl, "kl_k3": kl, "ref_nats_per_token": 1.5, "entropy": 1.4,
            "clip_fraction": 0.05, "explained_variance": 0.4 - 0.6 * 0.7**t, "decode_gap": 0.0,
            "frac_reward_zero_std": 0.1, "unscored": 0.0,
            "masked": 0.0,
        }  # fmt: skip
        figures |= trouble.change(t) if t or trouble.from_the_start else {}
        figures["reward"] += draw.gauss(0, figures["reward_std"] * error)
        figures["reward_error"] = figures["reward_std"] * error
        figures["answer_length_error"] = LENGTH_SPREAD * figures["answer_length"] * error
        figures["answer_length"] *= 1 + draw.gauss(0, LENGTH_SPREAD * error)
        figures["ended"] = sum(draw.random() < figures["ended"] for _ in range(answers)) / answers
        nats, tokens = max(figures["kl_k3"], 0.0), answers * figures["answer_length"]
        figures["kl_per_token"] += draw.gauss(0, (2 * nats / tokens) ** 0.5)
        yield figures


def real_run(path: Path) -> list[Figures]:
    """Figures of every iteration of a run."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {name: float(x) for name, x in record.items() if name not in ("kind", "step")}
        for record in records
        if record["kind"] == "train"
    ]


def said(figures: Iterator[Figures] | list[Figures]) -> list[tuple[int, str]]:
    """Iteration and rule of each warning, in their order."""
    monitor = HealthMonitor()
    found: list[tuple[int, str]] = []
    for iteration, each in enumerate(figures, 1):
        before = dict(monitor.said)
        try:
            monitor.observe(iteration, each)
        except UserError:
            return [*found, (iteration, NOT_FINITE)]
        found += [(iteration, rule) for rule, at in monitor.said.items() if before.get(rule) != at]
    return found


def count_made_up(seeds: int) -> None:
    """Print a line for each kind of made-up history."""
    print(f"made-up histories, {seeds} of each, {ITERATIONS} iterations")
    for name, trouble in TROUBLES.items():
        runs = [said(history(trouble, random.Random(seed))) for seed in range(seeds)]
        if trouble.rule is None:
            warned = Counter(rule for run in runs for _, rule in run)
            print(f"  {name:24} warned in {sum(map(bool, runs))}: {dict(warned)}")
            continue
        right = [run for run in runs if run and run[0][1] == trouble.rule]
        after = [run[0][0] - BEGINNING + 1 for run in right]
        others = Counter(rule for run in runs for _, rule in run if rule != trouble.rule)
        span = f"{min(after)} to {max(after)}" if after else "-"
        print(
            f"  {name:24} {trouble.rule} first in {len(right)}, after {span} iterations; "
            f"beside it {dict(others)}"
        )


def main() -> None:
    """Count made-up histories, then those of the given runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--seeds", type=int, default=200)
    args = parser.parse_args()
    count_made_up(args.seeds)
    if not args.runs:
        return
    found = {path: said(real_run(path)) for path in args.runs}
    print(f"real runs: {len(found)}, of which warned: {sum(map(bool, found.values()))}")
    for path, warnings in found.items():
        told = ", ".join(f"{rule} at {iteration}" for iteration, rule in warnings) or "nothing"
        print(f"  {path.parent.name if path.is_file() else path.name:24} {told}")


if __name__ == "__main__":
    main()
