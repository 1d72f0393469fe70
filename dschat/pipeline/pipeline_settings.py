"""Settings that the stages of a pipeline share: models, data, hardware."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dschat.errors import UserError
from dschat.pipeline.stage import PASSED, RESUME
from dschat.settings import Settings, setting
from dschat.utils.hostfile import read_hostfile


@dataclass(frozen=True)
class PipelineSettings(Settings):
    """What all stages share; a stage's own flags win."""

    FIRST_WORD: ClassVar[str] = "PIPELINE"

    output_dir: str = setting("./output", "the models of all stages, in folders of their own")
    model: str | None = setting(
        None, "what the first stage starts from; embedded: a small one, generated with its data"
    )
    reward_model: str | None = setting(
        None, "what the reward model starts from (default: the model of the stage sft)"
    )
    data_path: tuple[str, ...] = setting((), "data of all stages", may_be_empty=True)
    dataset_columns: tuple[str, ...] = setting(
        (), "which of its columns hold what, of all stages: prompt=ask chosen=good rejected=bad"
    )
    hardware: str = setting(
        "single_gpu",
        "one GPU, or the CPU where there is none; all of one machine; those of the hostfile",
        choices=("single_gpu", "single_node", "multi_node"),
    )
    ranks: int | None = setting(
        None, "processes on one machine (default: by GPUs)", at_least=1, at_most=1024
    )
    hostfile: str = setting("/job/hostfile", "of multi_node: a line `host slots=8` for each")
    seed: int = setting(1234, "seed of all stages", at_least=0)
    fit_to_rows: bool = setting(
        False, "choose accumulation, epochs and warm-up by the rows, where none are given here"
    )
    num_train_epochs: int | None = setting(None, "of every stage", at_least=1)
    gradient_accumulation_steps: int | None = setting(None, "of every stage", at_least=1)
    num_warmup_steps: int | None = setting(None, "of every stage", at_least=0)
    save_steps: int | None = setting(None, "steps between checkpoints, of every stage", at_least=0)
    overwrite_output_dir: bool = setting(False, "replace models that are there")
    resume: bool = setting(False, "skip finished stages, go on inside the one that stopped")
    dry_run: bool = setting(False, "check all stages and stop")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hardware == "multi_node" and self.ranks is not None:
            raise UserError(f"ranks {self.ranks}: the hostfile decides them; drop ranks")
        if self.hardware == "multi_node":
            read_hostfile(self.hostfile)

    @property
    def processes(self) -> int | None:
        """Processes of a stage; None for as many as this machine has GPUs."""
        if self.hardware == "multi_node":
            return sum(read_hostfile(self.hostfile).values())
        return self.ranks or (1 if self.hardware == "single_gpu" else None)

    @property
    def launcher(self) -> list[str]:
        """Words before `-m dschat` or its like that start the ranks of a stage."""
        python = [sys.executable, "-m"]
        if self.hardware == "multi_node":
            hosts = str(Path(self.hostfile).resolve())
            return [*python, "deepspeed.launcher.runner", "--hostfile", hosts, "--module", "dschat"]
        if self.hardware == "single_gpu" and self.ranks in (None, 1):
            return [*python, "dschat"]
        ranks = "gpu" if self.ranks is None else str(self.ranks)
        torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
        return [*python, *torchrun, "-m", "dschat"]

    @property
    def common_flags(self) -> list[str]:
        """Flags of every stage."""
        words = ["--seed", str(self.seed)]
        for name in PASSED:
            if (value := getattr(self, name)) is not None:
                words += [f"--{name}", str(value)]
        words += ["--data_path", *map(local, self.data_path)] if self.data_path else []
        words += ["--dataset_columns", *self.dataset_columns] if self.dataset_columns else []
        words += ["--overwrite_output_dir"] * self.overwrite_output_dir
        return words + [RESUME] * self.resume


def local(name: str) -> str:
    """Make the path of a file or folder absolute; ids stay."""
    return str(Path(name).resolve()) if Path(name).exists() else name
