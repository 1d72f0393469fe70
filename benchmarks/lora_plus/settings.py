"""Settings of the LoRA+ grid: sizes of each task, the lattice of rates, seeds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from benchmarks.lora_plus.report import Cell
from dschat.errors import UserError
from dschat.settings import Settings, setting

BAND = (0.125, 64.0)  # cells of other lambdas are not run


@dataclass(frozen=True)
class Preset:
    """Sizes of a task, and where its optima lie (exponents of two)."""

    steps: int
    batch_size: int
    max_seq_len: int
    eta_A: dict[str, tuple[int, int]]
    eta_B: dict[str, tuple[int, int]]
    eta_full: tuple[int, int]


PRESETS = {
    "embedded": Preset(
        steps=50,
        batch_size=16,
        max_seq_len=64,
        eta_A={"A": (-10, -5), "B": (-9, -6)},
        eta_B={"A": (-7, -2), "B": (-7, -3)},
        eta_full=(-10, -5),
    ),
    "hh": Preset(
        steps=40,
        batch_size=4,
        max_seq_len=128,
        eta_A={"A": (-14, -5), "B": (-11, -8)},
        eta_B={"A": (-9, -5), "B": (-10, -2)},
        eta_full=(-12, -7),
    ),
    "reward": Preset(
        steps=40,
        batch_size=16,
        max_seq_len=112,
        eta_A={"A": (-11, -5), "B": (-11, -5)},
        eta_B={"A": (-9, -3), "B": (-9, -3)},
        eta_full=(-12, -7),
    ),
    "dpo": Preset(
        steps=40,
        batch_size=16,
        max_seq_len=112,
        eta_A={"A": (-15, -9), "B": (-15, -9)},
        eta_B={"A": (-13, -7), "B": (-13, -7)},
        eta_full=(-15, -9),
    ),
}
OWN_DATA = ("embedded",)  # tasks that bring model and rows


@dataclass(frozen=True)
class GridSettings(Settings):
    """Flags of the benchmark."""

    output_dir: str = setting(dataclasses.MISSING, "results, caches and the summary")
    task: str = setting("embedded", "what is learned", choices=sorted(PRESETS))
    model_name_or_path: str | None = setting(None, "model folder, but of --task embedded")
    data_path: str | None = setting(None, "rows, but of --task embedded")
    figures_dir: str = setting("docs/figures", "where the heat maps are written")
    init: tuple[str, ...] = setting(
        (
            "A",
            "B",
        ),
        "the matrices that start random",
    )
    ratios: tuple[float, ...] | None = setting(
        None, "run these lambdas alone, without alpha, all weights and shorter schedules"
    )
    rank: int = setting(8, "rank of the adapters")
    steps: int | None = setting(None, "optimizer steps of a run (default: the task's)")
    grid_seeds: tuple[int, ...] = setting((1, 2, 3), "seeds of the grid")
    fresh_seeds: tuple[int, ...] = setting((11, 12, 13), "seeds of the winners")
    eta_A: tuple[int, ...] | None = setting(
        None, "first and last exponent of two (default: the task's)"
    )
    eta_B: tuple[int, ...] | None = setting(
        None, "first and last exponent of two (default: the task's)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := set(self.init) - {"A", "B"}:
            raise UserError(f"--init {min(wrong)}: choose A, B or both")
        if self.rank < 1:
            raise UserError(f"--rank {self.rank} is too small: give 1 or more")
        if self.steps is not None and self.steps < 4:
            raise UserError(f"--steps {self.steps} is too small: give 4 or more")
        if shared := set(self.grid_seeds) & set(self.fresh_seeds):
            raise UserError(
                f"--fresh_seeds {min(shared)} is a seed of the grid too: a winner must be judged "
                "on seeds that it was not chosen by"
            )
        for name in ("eta_A", "eta_B"):
            ends = getattr(self, name)
            if ends is not None and ends[0] > ends[1]:
                raise UserError(f"--{name} {ends[0]} {ends[1]}: give the smaller exponent first")
        given = (self.model_name_or_path, self.data_path)
        if self.task not in OWN_DATA and None in given:
            raise UserError(
                f"--task {self.task} needs --model_name_or_path and --data_path: give both"
            )
        if self.task in OWN_DATA and given != (None, None):
            raise UserError(
                f"--task {self.task} brings its own model and data: drop --model_name_or_path and "
                "--data_path, or choose another task"
            )
        for ratio in self.ratios or ():
            if ratio <= 0 or not math.log2(ratio).is_integer():
                raise UserError(f"--ratios {ratio:g}: the lattice has powers of two alone")

    @property
    def preset(self) -> Preset:
        """The task's own sizes."""
        return PRESETS[self.task]

    @property
    def budget(self) -> int:
        """Optimizer steps of a full run."""
        return self.preset.steps if self.steps is None else self.steps

    def lattice(self, init: str) -> list[Cell]:
        """Every (eta_A, eta_B) of the rectangle whose lambda lies in the band."""
        first_A, last_A = self.preset.eta_A[init] if self.eta_A is None else self.eta_A
        first_B, last_B = self.preset.eta_B[init] if self.eta_B is None else self.eta_B
        cells = [
            (2.0**a, 2.0**b)
            for a in range(first_A, last_A + 1)
            for b in range(first_B, last_B + 1)
            if BAND[0] <= 2.0 ** (b - a) <= BAND[1]
            if self.ratios is None or 2.0 ** (b - a) in self.ratios
        ]
        if not cells:
            raise UserError(f"the lattice has no cell of lambda {BAND[0]:g} to {BAND[1]:g}")
        return cells

    def shared(self) -> dict:
        """Settings that all runs of one results file share."""
        names = ("task", "model_name_or_path", "data_path", "rank")
        sizes = {"batch_size": self.preset.batch_size, "max_seq_len": self.preset.max_seq_len}
        return {name: getattr(self, name) for name in names} | sizes
