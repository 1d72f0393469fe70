"""DPO and its kin on the story model, judged by the rule of `benchmarks.stories`.

    python -m benchmarks.stories_dpo --model ./stories260K --data ./stories --output ./output

For each seed step 1 runs once, then DPO once for every arm, `LOSS` or `LOSS@RATE`: a loss at its
own default rate of A for this width or at another, with LoRA+ and one epoch unless further flags
say otherwise. Each policy then writes continuations of the held-out prompts.
"""

from __future__ import annotations

import argparse
import re

from benchmarks.stories import curve_end, judge, options, parsed, run, supervised, table, told
from dschat.config import DPOSettings
from dschat.functional.preferences import PREFERENCE_LOSSES

WIDTH, ITS_WIDTH = 2560, 64  # that default rates are meant for; of the story model
FIGURES = ("accuracy", "margin", "drift_chosen", "drift_rejected")


def one_seed(args: argparse.Namespace, seed: int) -> dict[str, tuple[float, float]]:
    """Step 1, then every arm; mood and nats by name."""
    out, shared, small = supervised(args, seed)
    sft = out / "sft"
    found = {"sft": judge(sft, sft, out, args.draws, seed)}
    print(f"seed {seed}: {told(*found['sft'])} after step 1", flush=True)
    for arm in args.arms:
        loss, _, rate = arm.partition("@")
        flags = {"model_name_or_path": str(sft), "loss_type": loss, "lora_dim": "16"}
        flags |= {"learning_rate": rate or default_rate(loss)}
        more = re.sub("[^a-z0-9]+", "-", " ".join(f"{k} {v}" for k, v in args.more.items()))
        folder = out / f"dpo-{re.sub('[^a-z0-9]+', '-', arm)}{more and '-' + more}"
        if not (folder / "config.json").is_file():
            run("dpo", folder, shared | small | flags | args.more)
        found[arm] = judge(folder, sft, out, args.draws, seed)
        names = [n for n in FIGURES if n.startswith(("acc", "mar")) or has_drift(loss)]
        figures = ", ".join(f"{name} {curve_end(folder, name):.3f}" for name in names)
        print(f"  {arm}: {told(*found[arm])}; {figures}", flush=True)
    return found


def default_rate(loss: str) -> str:
    """A's rate by default, as one over the width (docs/dpo.md)."""
    rates = DPOSettings.of(model_name_or_path=".", loss_type=loss).model.optimizer
    return f"{WIDTH / ITS_WIDTH * rates.lora_A_rate:.2g}"


def has_drift(loss: str) -> bool:
    """Tell whether there is a reference to drift from."""
    return PREFERENCE_LOSSES[loss].needs_reference


def main() -> None:
    """Every seed, then a table of the arms."""
    parser = options(__doc__)
    parser.add_argument("--arms", nargs="+", default=list(PREFERENCE_LOSSES))
    args = parsed(parser)
    table({seed: one_seed(args, seed) for seed in args.seeds}, args.arms)


if __name__ == "__main__":
    main()
