"""Every command of the pages is one: its program is there and takes its flags with these values.

Other tests train with `make quickstart` and README's chat, scripts, `dschat run`, `inspect`,
`compare`, `winrate`, `merge`, `checkpoint` and `doctor`, as they stand or on a tiny model.
"""

import re
import shlex
from pathlib import Path

import pytest

from dschat.command.registry import COMMANDS
from dschat.config.cli import parse
from dschat.config.programs import PromptEvaluation
from dschat.errors import UserError
from dschat.pipeline.recipe import shipped
from dschat.settings import flags_of
from tests.docs.test_pages import PAGES
from tests.docs.test_site import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
# Programs of others, words of the shell, and our modules that no settings class describes.
OTHERS = {
    *("pip", "hf", "vllm", "vllm-env/bin/vllm", "vllm-env/bin/pip", "lm_eval", "transformers"),
    *("nodes=($(scontrol", "until", "trap", "code=0", "wait", "if", "exit", "python3", "docker"),
    *("cd", "git", "export", "sbatch", "ssh", "srun", "{"),
    *("dschat completion", "dschat push", "dschat checkpoint", "dschat doctor", "dschat merge"),
    "dschat report",
    *("benchmarks", "tests.faults", "dschat.train.launch"),
}
STEPS = ("sft", "reward", "dpo", "ppo")
MODULES = {"dschat.data": "inspect", "dschat.plan": "plan", "dschat.winrate": "winrate"}
FILES = {"rw_eval.py": "eval", "chat.py": "chat"}
MISSING = ("no such file", "is required", "no such folder", "needs --actor-model", "hostfile")


def commands() -> list[tuple[str, str]]:
    """Pages with each of their commands, line by line."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    found.append((str(page.relative_to(ROOT)), line.strip()))
    return found


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """What a command line starts, past variables and launchers, and the words it gets."""
    words = [w for w in words if w not in ("&", "...", "…")]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    for i, word in enumerate(words):
        if word == "dschat" and i + 1 < len(words):
            return f"dschat {words[i + 1]}", words[i + 2 :]
        if word.endswith((".py", ".sh")) and "/bin/" not in word:
            return word, words[i + 1 :]
        module = words[i + 1] if word == "-m" else ""
        if module == "benchmarks" or module.startswith("benchmarks."):
            return "benchmarks", words[i + 2 :]
        if module.startswith(("dschat.", "tests.")) and module != "dschat.train.launch":
            return module, words[i + 2 :]  # the launcher starts what follows
    return words[0], words[1:]


def takes(kinds: tuple[str, ...], argv: list[str]) -> None:
    """One of these programs takes the words; files that they name need not be there."""
    errors = []
    if "--config" in argv:  # a file of one's own, or of the checkout
        at = argv.index("--config")
        argv = argv[:at] + argv[at + 2 :]
    for kind in kinds:
        cls = SETTINGS.get(kind, PromptEvaluation)
        first = [] if getattr(cls, "FIRST_WORD", None) is None else argv[:1]
        try:
            parse(cls, argv[len(first) :], None)
            return
        except UserError as error:
            errors.append(f"{kind}: {error}")
        if any(part in errors[-1].lower() for part in MISSING):
            known = {flag.name for flag in flags_of(cls)}
            names = [w.lstrip("-").split("=")[0] for w in argv if w.startswith("--")]
            if {name.replace("-", "_") for name in names} <= known:
                return
    raise AssertionError(errors)


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda text: text[:60])
def test_a_command_is_one(page: str, line: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for part in re.split(r" (?:&&|\|\||\|) ", line):
        words = shlex.split(part.replace("[--phase 1]", ""), comments=True)
        program, argv = program_of(words)
        argv = argv[: argv.index(">")] if ">" in argv else argv
        if program == "make":
            assert re.search(rf"^{argv[0]}:", (ROOT / "Makefile").read_text(), re.M), line
        elif program.endswith(".sh"):
            places = [ROOT, (ROOT / page).parent, ROOT / "training"]
            assert any((place / program).is_file() for place in places), line
        elif program == "dschat run":
            assert argv[0] in shipped() or argv[0].endswith(".yaml"), line
            takes(("run",), argv)
        elif program.startswith("dschat ") and program not in OTHERS:
            assert program.removeprefix("dschat ") in COMMANDS, line
            takes((program.removeprefix("dschat "),), argv)
        elif program in MODULES:
            argv = argv[1:] if program == "dschat.data" else argv
            takes((MODULES[program],), argv) if program != "dschat.plan" else None
        elif Path(program).name in FILES:
            takes((FILES[Path(program).name],), argv)
        elif Path(program).name == "main.py":
            takes(STEPS, argv)
        elif Path(program).name != "e2e_rlhf.py":
            assert program in OTHERS or program.startswith(("dschat.", "echo")), line
