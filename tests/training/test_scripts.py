"""Every shipped script hands its arguments to flags that exist; no training is started."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.shell import STEP1, STEP3, TRAINING, fake_launchers, started
from tests.helpers.tiers import tiers

LAUNCH = TRAINING / "launch.sh"
SCRIPTS = sorted({*TRAINING.rglob("*.sh")} - {LAUNCH})
RECIPES = TRAINING.parent / "dschat" / "recipes"
BASH = shutil.which("bash")


def name_of(script: Path) -> str:
    return str(script.relative_to(TRAINING))


def is_training(script: Path) -> bool:
    return "training_scripts" in script.parts


CORE = [
    "step1_supervised_finetuning/evaluation_scripts/run_prompt.sh",
    STEP1 + "single_gpu/run_1.3b.sh",
    "step2_reward_model_finetuning/training_scripts/quickstart/run.sh",
    STEP3 + "single_node/run_1.3b.sh",
]
every_script = pytest.mark.parametrize("name", tiers(map(name_of, SCRIPTS), CORE))


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    return fake_launchers(tmp_path, monkeypatch)


def positional(script: Path) -> tuple[list[str], list[str]]:
    """The names of a script's required and optional arguments, from its usage line."""
    usage = re.search(r"^# Usage: bash \S+ (.+) \[more flags of \S+", script.read_text(), re.M)
    assert usage is not None, f"{script}: no line `# Usage: bash NAME ARGUMENTS [more flags of ...`"
    names = usage.group(1).split()
    optional = [name.strip("[]") for name in names if name.startswith("[")]
    required = [name for name in names if not name.startswith("[")]
    assert names == [*required, *(f"[{name}]" for name in optional)]
    return required, optional


def test_scripts_are_sound_bash_in_the_house_form():
    assert {name[:5] for name in map(name_of, SCRIPTS)} >= {"step1", "step2", "step3"}
    for script in (LAUNCH, *SCRIPTS):
        assert subprocess.run([BASH, "-n", script], check=False).returncode == 0, script
    for script in SCRIPTS:
        lines = script.read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash" and script.stat().st_mode & 0o111, script
        commands = [line for line in lines if line.strip() and not line.startswith("#")]
        assert commands[0] == "set -euo pipefail", script
        if is_training(script):
            depth = len(script.relative_to(TRAINING).parts) - 1
            up = "../" * depth
            assert commands[1] == f'source "$(dirname "${{BASH_SOURCE[0]}}")/{up}launch.sh"', script
            assert commands[-1].split()[0] == "start", script
        else:
            assert commands[-1].strip() == '"$@"', script


@every_script
def test_defaults_and_empty_words_mean_the_same(name: str, shell):
    required, optional = positional(TRAINING / name)
    models = [f"some/{word.lower()}" for word in required]
    plain = started(shell(BASH, str(TRAINING / name), *models))
    empty = started(shell(BASH, str(TRAINING / name), *models, *["" for _ in optional]))
    assert plain == empty
    assert plain.program.is_file()
    assert plain.program.parent == TRAINING / Path(name).parts[0]
    settings = plain.settings()
    if is_training(TRAINING / name):
        assert settings.run.output_dir.startswith("./output")
        assert Path(plain.arguments[1]).is_relative_to(RECIPES)


@every_script
def test_given_words_and_more_flags_arrive(name: str, shell, tmp_path: Path):
    required, optional = positional(TRAINING / name)
    # A space in each word: one that is not quoted would fall apart.
    words = {word: str(tmp_path / word.lower() / "with space") for word in [*required, *optional]}
    words |= {word: "1" for word in words if word.endswith("ZERO_STAGE")}
    command = started(shell(BASH, str(TRAINING / name), *words.values(), "--seed", "77"))
    assert command.arguments[-2:] == ["--seed", "77"]
    for word, value in words.items():
        assert value in command.arguments, word
    settings = command.settings()
    if is_training(TRAINING / name):
        assert settings.run.seed == 77
        assert settings.run.output_dir == words["OUTPUT"]
        assert Path(words["OUTPUT"], "training.log").read_text().splitlines()[-1] == "77"
    else:
        assert getattr(settings, "evaluation", settings).seed == 77


@every_script
def test_a_missing_required_word_is_told_by_its_place(name: str, shell):
    required, _ = positional(TRAINING / name)
    for count in range(len(required)):
        process = shell(BASH, str(TRAINING / name), *["x"] * count)
        assert process.returncode != 0
        assert process.stdout == ""  # nothing was started
        place = f"error: {Path(name).name}: {required[count]} is missing: give "
        place = place if is_training(TRAINING / name) else f": {count + 1}: "
        assert re.search(rf"{place}(the|a) \w+", process.stderr), process.stderr


@every_script
def test_a_failed_run_fails_the_script(
    name: str, shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_EXIT", "3")  # must not be hidden by the pipe to the log
    names = [word for words in positional(TRAINING / name) for word in words]
    words = [str(tmp_path / "out") if word == "OUTPUT" else "2" for word in names]
    assert shell(BASH, str(TRAINING / name), *words).returncode == 3


def test_more_flags_stand_after_the_script_s_own_and_the_log_grows(shell, tmp_path: Path):
    script, out = str(TRAINING / STEP1 / "single_gpu/run_1.3b.sh"), str(tmp_path / "a b")
    command = started(shell(BASH, script, out, "", "--output_dir", "c", "--tensorboard_path", "d"))
    settings = command.settings()
    assert (settings.run.output_dir, settings.run.log.tensorboard_path) == ("c", "d")
    log = Path(out, "training.log")
    size = len(log.read_text())
    started(shell(BASH, script, out))
    assert len(log.read_text()) > size > 0


def test_another_launcher_takes_the_place_of_deepspeed(shell, monkeypatch: pytest.MonkeyPatch):
    script = str(TRAINING / STEP1 / "single_node/run_1.3b.sh")
    usual = started(shell(BASH, script))
    assert (usual.launcher, usual.options) == ("deepspeed", [])
    monkeypatch.setenv("LAUNCHER", "python -m torch.distributed.run --nproc_per_node 2")
    other = started(shell(BASH, script))
    assert (other.launcher, other.options[-2:]) == ("python", ["--nproc_per_node", "2"])
    assert other.arguments == usual.arguments


def test_what_the_environment_holds_by_chance_is_no_argument(shell, monkeypatch):
    for name in ("ZERO_STAGE", "ACTOR_MODEL_PATH", "CRITIC_ZERO_STAGE", "OUTPUT", "MORE"):
        monkeypatch.setenv(name, "7")
    command = started(shell(BASH, str(TRAINING / STEP1 / "single_gpu/run_1.3b.sh")))
    assert "7" not in command.arguments


def test_step_1_on_one_gpu_keeps_accumulation_and_rank(shell):
    command = started(shell(BASH, str(TRAINING / STEP1 / "single_gpu" / "run_1.3b.sh")))
    assert (command.launcher, command.options) == ("deepspeed", ["--num_gpus", "1"])
    settings = command.settings()
    assert settings.model_name_or_path == "facebook/opt-1.3b"
    assert settings.run.engine.gradient_accumulation_steps == 8
    assert settings.model.lora.lora_dim == 128


def test_step_3_on_one_gpu_updates_on_32_rows(shell):
    script = TRAINING / STEP3 / "single_gpu" / "run_1.3b.sh"
    settings = started(shell(BASH, str(script), "sft", "reward")).settings()
    rows = settings.batches_per_iteration * settings.ppo.per_device_generation_batch_size
    assert rows / settings.updates == 32
    assert list(settings.remarks(iterations=10**6)) == []
