"""The programs that are broken, a record each, and the layouts that each is started in."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from tests.helpers import resume_runs
from tests.helpers.steps import PPO, REWARD, ROOT, SFT
from tests.helpers.tiny import save_llama_folder

DPO = "training/step2_dpo_finetuning/main.py"
OUTPUT, OLDER = "out", "older"
# Of 67 rows a third train, 4 in a step: 5 steps in each of 2 epochs with a short one at the end.
# Dropout draws at each step, and saves (every 3) lie between lines of the log (every 2).
DATA = "--data_path data --data_split 1,1,1 --data_output_path cache --dtype fp32 --log_every 2"
LORA = "--lora_dim 4 --lora_dropout 0.3 --loraplus_lr_ratio 16 --dropout 0.1"
BATCHES = "--per_device_train_batch_size {rows} --gradient_accumulation_steps 2"
TRAINING = "--max_seq_len 64 --num_train_epochs 2 --num_warmup_steps 2 --learning_rate 1e-3"
ONE_MODEL = f"--model_name_or_path model {DATA} {LORA} {BATCHES} {TRAINING} --zero_stage {{stage}}"
# 2 iterations in each of 2 epochs, a checkpoint after each: sampling takes seconds at ZeRO-3.
ROLES = (
    "--actor_model_name_or_path model --critic_model_name_or_path critic --actor_lora_dim 4 "
    "--critic_lora_dim 4 --actor_lora_dropout 0.3 --actor_loraplus_lr_ratio 16 "
    "--critic_loraplus_lr_ratio 16 --max_prompt_seq_len 48 --max_answer_seq_len 3 "
    "--num_warmup_steps 0 --enable_ema --print_answers "
    "--print_answers_interval 1 --actor_learning_rate 1e-3 --critic_learning_rate 1e-3 "
    "--per_device_generation_batch_size {rows} --per_device_training_batch_size {rows} "
    "--generation_batches 2 --max_train_samples 8 --num_train_epochs 2 --max_eval_samples 2 "
    "--actor_zero_stage {stage} --critic_zero_stage {stage}"
)
ADAPTER = f"--lora_save adapter {ONE_MODEL}"


@dataclass(frozen=True)
class Program:
    """A program as it is started.

    Attributes:
        flags: with {rows} (of one rank, 4 on all) and {stage} of ZeRO. save_steps: its steps, or
            iterations, between checkpoints. models: the model folders that it reads. replaces: the
        output folder holds an older model, and the results are those of this other program.
    """

    main: str
    flags: str
    save_steps: int
    models: tuple[str, ...] = ("model",)
    replaces: str | None = None

    @property
    def is_there(self) -> bool:
        """Tell whether this checkout has the program."""
        return (ROOT / self.main).exists()


PROGRAMS = {
    "sft": Program(SFT, ONE_MODEL, save_steps=3),
    "sft-over": Program(SFT, f"--overwrite_output_dir {ONE_MODEL}", save_steps=3, replaces="sft"),
    "sft-adapter": Program(SFT, ADAPTER, save_steps=3),
    "reward": Program(REWARD, ONE_MODEL, save_steps=3),
    "dpo": Program(DPO, ONE_MODEL, save_steps=3),
    "ppo": Program(PPO, f"{DATA} {ROLES}", save_steps=1, models=("model", "critic")),
}


@dataclass(frozen=True)
class Layout:
    """A program on so many ranks at a ZeRO stage; `sft-z2-r1` is its name."""

    program: str
    stage: int
    ranks: int

    @classmethod
    def named(cls, name: str) -> Layout:
        """Read a name."""
        program, stage, ranks = name.rsplit("-", 2)
        return cls(program, int(stage.removeprefix("z")), int(ranks.removeprefix("r")))

    @property
    def name(self) -> str:
        """Short name, unique."""
        return f"{self.program}-z{self.stage}-r{self.ranks}"

    @property
    def record(self) -> Program:
        """The program's record."""
        return PROGRAMS[self.program]

    @property
    def plain(self) -> Layout:
        """The layout that has the same results, and begins in an empty folder."""
        return replace(self, program=self.record.replaces or self.program)

    def argv(self) -> list[str]:
        """Command line of a run that never saves a checkpoint."""
        program = self.record
        flags = program.flags.format(rows=2 // self.ranks, stage=self.stage)
        return [program.main, *shlex.split(flags), "--output_dir", OUTPUT]

    def saving(self, limit: int) -> list[str]:
        """Command line that a scheduler would start again and again."""
        saves = ["--save_steps", self.record.save_steps, "--save_total_limit", limit, "--resume"]
        return [*self.argv(), *map(str, saves)]


def layouts(programs: Collection[str] | None = None) -> list[Layout]:
    """All layouts of the programs that this checkout has."""
    names = [name for name, program in PROGRAMS.items() if program.is_there]
    return [
        Layout(name, stage, ranks)
        for ranks in (1, 2)
        for stage in (0, 2, 3)
        for name in names
        if programs is None or name in programs
    ]


def write_inputs(folder: Path) -> None:
    """Data and models that all programs read."""
    folder.mkdir(parents=True)
    resume_runs.write_models(folder)
    save_llama_folder(folder / OLDER, seed=5, num_hidden_layers=1)


def copy_inputs(inputs: Path, folder: Path, layout: Layout) -> Path:
    """A folder for one run, with files of the user's own in its output folder."""
    shutil.copytree(inputs, folder)
    if layout.record.replaces:
        shutil.copytree(inputs / OLDER, folder / OUTPUT)
    for name, text in USERS_FILES.items():
        path = folder / OUTPUT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


USERS_FILES = {"notes/mine.txt": "mine\n", "training.log": "a shell's log\n"}
