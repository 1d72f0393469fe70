"""The commands of the pages, and what becomes of each in a test: it runs, or a reason why not.

A command is started in a folder where the names that its page uses are there: tiny models stand at
those of large ones, a few rows at those of data sets (`page_folders`). What else is not as on the
page is listed here: words with another meaning, and words that are added.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests.docs.test_pages import PAGES, ROOT

# Not started, by program; what a launcher starts is.
UNTRIED = {
    "pip": "needs an index of packages; make release-check installs",
    "vllm-env/bin/pip": "needs an index of packages",
    "python3": "makes an environment for vLLM",
    "hf": "needs the Hub and a person",
    "vllm": "needs a GPU; tests/helpers/vllm_stub.py stands in for it",
    "vllm-env/bin/vllm": "needs a GPU; tests/helpers/vllm_stub.py stands in for it",
    "lm_eval": "tests/inference/test_other_tools.py starts it where it is installed",
    "transformers": "tests/inference/test_other_tools.py starts it where it is installed",
    "tests.faults": "the slow tests of tests/faults run cases",
    "compare --live": "tests/compare/test_live.py, with a browser",
    "*.sh": "tests/training/test_scripts.py runs all, test_scripts_run.py trains by them",
    "make": "each target is checked in test_commands.py; the tests are one",
    "srun": "needs Slurm; test_commands.py runs the whole scripts",
    "shell": "test_commands.py runs the whole scripts for Slurm",
}
SHELL = ("code=0", "exit", "if", "nodes=($(scontrol", "trap", "until", "wait", "{", "curl")
CHANGED = (
    (r"^200$", "4"),
    (r"^256$", "16"),
    (r"step-000200", "step-000004"),
    (r"^http://\S*:8000", "http://SERVER"),
    (r"^(/shared|\$SHARED)", "./shared"),
)
STEP1 = "training/step1_supervised_finetuning"
STEP2 = "training/step2_reward_model_finetuning"
STEP3 = "training/step3_rlhf_finetuning"
FILES = {
    f"{STEP1}/main.py": "sft",
    f"{STEP3}/main.py": "ppo",
    "rw_eval.py": "eval",
    "e2e_rlhf.py": "e2e",
}
ROWS = ("--data_path", "./pairs.jsonl")
LITTLE = (
    ("--num_train_epochs", "1"),
    ("--per_device_train_batch_size", "4"),
    ("--gradient_accumulation_steps", "1"),
    ("--overwrite_output_dir",),
)
# What a program is given beside the words of the page, unless these or a file give it.
NAMED: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (("--model_name_or_path", "./my-model"), ROWS),
    "ppo": (
        ("--actor_model_name_or_path", "./my-model"),
        ("--critic_model_name_or_path", "./reward"),
        ROWS,
    ),
}
ADDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (*LITTLE, ("--max_seq_len", "64")),
    "reward": (*LITTLE, ("--max_seq_len", "64")),
    "ppo": (
        *LITTLE[2:],
        ("--per_device_generation_batch_size", "8"),
        ("--per_device_training_batch_size", "8"),
        ("--max_prompt_seq_len", "64"),
        ("--max_answer_seq_len", "4"),
    ),
    "compare": (("--max_answer_seq_len", "8"),),
    "winrate": (("--max_answer_seq_len", "8"), ("--max_seq_len", "2000")),
    "run": (("--dry_run",), ("--output_dir", "./unwritten")),
    "e2e": (("--dry-run",), ("--output-dir", "./unwritten")),
}
HERE = {
    ("docs/hardware.md", "sft"): (("--lora_dim", "8"), ROWS, NAMED["sft"][0]),
    ("docs/ppo/rollout.md", "ppo"): (NAMED["ppo"][0], ("--actor_lora_dim", "8")),
}
REPORTED = ("dschat sft --model_name_or_path", "deepspeed --hostfile")  # what `report` needs
FAST = ("completion", "inspect")


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        line: where it stands. program: in UNTRIED or a command of `dschat`; what a launcher starts.
        words: of the command line to start. given: on standard input.
    """

    page: str
    line: str
    program: str
    words: tuple[str, ...]
    given: str = ""

    @property
    def folder(self) -> str:
        """Name of the folder to start it in: that of its page, or one of its own."""
        return f"{self.page}.launch" if "dschat.train.launch --log" in self.line else self.page


def lines() -> Iterator[tuple[str, str]]:
    """Yield pages with each of their command lines."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    yield str(page.relative_to(ROOT)), line.strip()


def commands() -> list[Command]:
    """Take the command lines apart."""
    found = []
    for page, line in lines():
        given = "Hi\n"
        for part in re.split(r" (?:&&|\|\||\|) ", line.replace("[--phase 1]", "--phase 1")):
            words = shlex.split(part, comments=True)
            if words[0] == "echo":
                given = " ".join(words[1:]) + "\n"
            else:
                found.append(_command(page, line, words, given))
    return found


def _command(page: str, line: str, words: list[str], given: str) -> Command:
    words = [w for w in words if w not in ("&", "...", "…")]
    words = words[: words.index(">")] if ">" in words else words
    words = words[: words.index(">>")] if ">>" in words else words
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] in SHELL:
        return Command(page, line, "shell", tuple(words))
    program, start = words[0], words
    for i, word in enumerate(words):
        module = words[i + 1] if word in ("-m", "--module") else ""
        if word == "dschat":
            program, start = words[i + 1], words[i:]
        elif word.endswith(".sh"):
            program = "*.sh"
        elif word.endswith(".py"):
            file = word
            if word == "main.py":
                file = f"{STEP3 if page.startswith('docs/ppo') else STEP1}/main.py"
            program = FILES[file]
            start = ["dschat", *([] if program == "e2e" else [program]), *words[i + 1 :]]
            start = ["python", "e2e_rlhf.py", *words[i + 1 :]] if program == "e2e" else start
        elif module.startswith(("benchmarks", "dschat.", "tests.")):
            if module == "dschat.train.launch":
                continue
            program, start = module.removeprefix("dschat."), ["python", *words[i:]]
            program = "inspect" if program == "data" else program
        else:
            continue
        break
    if start[1:3] == ["compare", "--live"]:
        program = "compare --live"
    start = [_changed(word) for word in start]
    if program in ("sft", "reward", "ppo") and not line.startswith(REPORTED):
        start.append("--no_report")
    named = () if "--config" in start else NAMED.get(program, ())
    for flag, *values in (*named, *ADDED.get(program, ()), *HERE.get((page, program), ())):
        start += [flag, *values] if flag not in start else []
    return Command(page, line, program, tuple(start), given)


def _changed(word: str) -> str:
    for pattern, text in CHANGED:
        word = re.sub(pattern, text, word)
    return word
