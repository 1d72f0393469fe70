"""Every command of `dschat` and its program; one line adds one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
TRAIN, USE, LOOK = "train", "use", "look"  # groups of the help, in this order


@dataclass(frozen=True)
class Command:
    """A command, and the program that does its work.

    Attributes:
        program: a module; or a file below the checkout, in a wheel below `dschat/programs`.
        words: that the program gets before those of the command line.
    """

    name: str
    group: str
    purpose: str
    program: str
    words: tuple[str, ...] = ()

    @property
    def file(self) -> Path | None:
        """The program's file; None for a module."""
        if not self.program.endswith(".py"):
            return None
        packed = PACKAGE / "programs" / self.program
        return packed if packed.is_file() else PACKAGE.parent / self.program


STEP1 = "training/step1_supervised_finetuning"
STEP2 = "training/step2_reward_model_finetuning"
DPO = "training/step2_dpo_finetuning"
STEP3 = "training/step3_rlhf_finetuning"

_ALL = (
    Command("sft", TRAIN, "step 1: teach a model to answer", f"{STEP1}/main.py"),
    Command("reward", TRAIN, "step 2: a reward model from preferences", f"{STEP2}/main.py"),
    Command("dpo", TRAIN, "step 2 and 3 in one: preferences alone", f"{DPO}/main.py"),
    Command("ppo", TRAIN, "step 3: PPO, RLOO or GRPO", f"{STEP3}/main.py"),
    Command("run", TRAIN, "several of these in turn, from one file", "dschat.pipeline"),
    Command("chat", USE, "talk to a model folder, or to a server", "inference/chatbot.py"),
    Command("eval", USE, "accuracy and scores of a reward model", f"{STEP2}/rw_eval.py"),
    Command("compare", USE, "answers of models side by side, on a page", "dschat.compare"),
    Command("winrate", USE, "one model's answers against another's", "dschat.winrate"),
    Command("merge", USE, "an adapter into its base", "dschat.merge"),
    Command("push", USE, "a finished model to the Hub", "dschat.push"),
    Command("inspect", LOOK, "data as training would see it", "dschat.data", ("inspect",)),
    Command("report", LOOK, "the page of a run, made again", "dschat.report"),
    Command("plan", LOOK, "memory and time of a step before it runs", "dschat.plan"),
    Command("checkpoint", LOOK, "inspect, verify or convert a checkpoint", "dschat.checkpoint"),
    Command("doctor", LOOK, "whether this machine can train", "dschat.command.doctor"),
    Command("completion", LOOK, "completion for your shell", "dschat.command.completion"),
)
COMMANDS = {command.name: command for command in _ALL}


def by_group() -> Iterator[tuple[str, list[Command]]]:
    """Yield each group's name with its commands."""
    for group in (TRAIN, USE, LOOK):
        yield group, [command for command in _ALL if command.group == group]
