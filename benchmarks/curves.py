"""Draw measured curves as SVG, from the figures beside them in docs/figures.

    pip install matplotlib
    python -m benchmarks.curves

Runs nothing: `benchmarks.stories`, `benchmarks.quickstart_gold` and `benchmarks.lora_plus_grid`
measure. On a white ground, so that the figures read on dark pages too.
"""

from __future__ import annotations

import csv
from pathlib import Path

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
COLOURS = {
    "ppo, 1 epoch": "#1f77b4",
    "ppo, 4 epochs": "#0b3d66",
    "rloo": "#d95f02",
    "grpo": "#1b9e77",
}
BEFORE, AFTER = "#8c8c8c", "#1f77b4"
RATIOS = {1.0: "#8c8c8c", 16.0: "#d95f02"}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dschat",  # the same file from the same figures
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def columns_of(name: str) -> dict[str, list[float]]:
    """Read docs/figures/NAME.csv: the numbers of each column by its heading."""
    with (FIGURES / f"{name}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {heading: [float(row[heading]) for row in rows] for heading in rows[0]}


def draw_rewards(axes) -> None:
    """Draw the mean reward of each arm of the stories by iteration."""
    arms = columns_of("stories_rewards")
    iterations = arms.pop("iteration")
    for name, rewards in arms.items():
        axes.plot(iterations, rewards, marker="o", markersize=3.5, color=COLOURS[name], label=name)
    axes.set(
        title="Stories: reward by iteration",
        xlabel="iteration of 128 answers",
        ylabel="mean reward, spreads of its scores",
        xticks=iterations,
        ylim=(0, 1.4),
    )
    axes.legend(loc="lower right")


def draw_gold(axes) -> None:
    """Draw how often answers pass the quickstart's gold rule before and after PPO, by seed."""
    gold = columns_of("quickstart_gold")
    places = range(len(gold["seed"]))
    for place, before, after in zip(places, gold["after SFT"], gold["after PPO"], strict=True):
        axes.plot([place, place], [before, after], color="#c4c4c4", linewidth=2, zorder=1)
        for share, offset in ((before, -0.085), (after, 0.045)):
            axes.text(place, share + offset, f"{share:.3f}", ha="center")
    axes.scatter(places, gold["after SFT"], s=55, color=BEFORE, zorder=2, label="after SFT")
    axes.scatter(places, gold["after PPO"], s=55, color=AFTER, zorder=2, label="after PPO")
    axes.set(
        title="Quickstart: gold success",
        xlabel="seed",
        ylabel="share of sampled answers",
        ylim=(0, 1.1),
        xlim=(-0.6, len(places) - 0.4),
        xticks=list(places),
        xticklabels=[f"{seed:.0f}" for seed in gold["seed"]],
    )
    axes.legend(loc="lower right")


def draw_ratios(axes, name: str, title: str) -> None:
    """Draw the losses along the lambdas of `benchmarks.lora_plus_grid --ratios`, all seeds."""
    found = columns_of(f"lora_plus_{name}_initA")
    for ratio, colour in RATIOS.items():
        rows = [i for i, other in enumerate(found["ratio"]) if other == ratio]
        rates = [found["eta_A"][i] * ratio**0.5 for i in rows]
        loss, low, high = ([found[c][i] for i in rows] for c in ("loss", "lowest", "highest"))
        axes.plot(rates, loss, marker="o", markersize=4, color=colour, label=f"λ = {ratio:.0f}")
        axes.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set(title=title, xlabel="√(η_A η_B)", ylabel="held-out loss of a pair")
    axes.legend(loc="upper left")


def main() -> None:
    """Write ppo_stories.svg, overview.svg and lora_plus_pairs.svg."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    metadata = {"Date": None, "Creator": None}
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
        draw_rewards(axes)
        figure.savefig(FIGURES / "ppo_stories.svg", metadata=metadata)
        figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
        draw_rewards(panels[0])
        draw_gold(panels[1])
        figure.savefig(FIGURES / "overview.svg", metadata=metadata)
        figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
        draw_ratios(panels[0], "reward", "Reward model")
        draw_ratios(panels[1], "dpo", "DPO")
        figure.savefig(FIGURES / "lora_plus_pairs.svg", metadata=metadata)


if __name__ == "__main__":
    main()
