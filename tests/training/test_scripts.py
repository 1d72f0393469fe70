"""Every shipped script hands its arguments to flags that exist; no training is started."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.helpers.shell import STEP1, STEP3, TRAINING, fake_launchers, started
from tests.helpers.tiers import tiers

LAUNCH = TRAINING / "launch.sh"
SWEEPS = sorted(TRAINING.rglob("*_sweep.sh"))  # they start their neighbour run_single.sh
CLUSTER = [*TRAINING.glob("cluster/*.sh")]  # they start others: test_cluster.py
SCRIPTS = sorted({*TRAINING.rglob("*.sh")} - {LAUNCH, *SWEEPS, *CLUSTER})
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
    usage = re.search(r"^# Usage: bash \S+ (.*)\[more flags of \S+", script.read_text(), re.M)
    assert usage is not None, f"{script}: no line `# Usage: bash NAME ARGUMENTS [more flags of ...`"
    names = usage.group(1).split()
    optional = [name.strip("[]") for name in names if name.startswith("[")]
    required = [name for name in names if not name.startswith("[")]
    assert names == [*required, *(f"[{name}]" for name in optional)]
    return required, optional


def words_for(script: Path, folder: Path) -> dict[str, str]:
    """A word for each argument; with a space in what may have one: unquoted it would fall apart."""
    words = {}
    for name in [word for part in positional(script) for word in part]:
        words[name] = str(folder / name.lower() / "with space")
        if name.endswith(("ZERO_STAGE", "STEP")):
            words[name] = "1"
        elif name in ("OFFLOAD", "LORA", "MIXED_PRECISION_LORA", "ENABLE_HYBRID_ENGINE", "TEST"):
            words[name] = "true"
    return words


def test_scripts_are_sound_bash_in_the_house_form():
    assert {name[:5] for name in map(name_of, SCRIPTS)} >= {"step1", "step2", "step3"}
    for script in (LAUNCH, *SCRIPTS, *SWEEPS):
        assert subprocess.run([BASH, "-n", script], check=False).returncode == 0, script
    for script in (*SCRIPTS, *SWEEPS):
        lines = script.read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash" and script.stat().st_mode & 0o111, script
        commands = [line for line in lines if line.strip() and not line.startswith("#")]
        assert commands[0] == "set -euo pipefail", script
        if is_training(script):
            depth = len(script.relative_to(TRAINING).parts) - 1
            up = "../" * depth
            here = '$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")'
            assert commands[1] == f'source "{here}/{up}launch.sh"', script
            assert re.search("conclude" if script in SWEEPS else r"\bstart\b", commands[-1]), script
        else:
            assert commands[-1].strip() == '"$@"', script


def linked(script: Path, folder: Path) -> str:
    """A symbolic link to a script, by another name and far from what it shares with others."""
    link = folder / "link to it"
    link.symlink_to(os.path.relpath(script, folder))
    return str(link)


@every_script
def test_defaults_and_empty_words_mean_the_same_by_a_link_too(name: str, shell, tmp_path: Path):
    required, optional = positional(TRAINING / name)
    models = [f"some/{word.lower()}" for word in required]
    plain = started(shell(BASH, str(TRAINING / name), *models))
    link = linked(TRAINING / name, tmp_path)
    empty = started(shell(BASH, link, *models, *["" for _ in optional]))
    assert plain == empty
    assert plain.program.is_file()
    assert plain.program.parent == TRAINING / Path(name).parts[0]
    settings = plain.settings()
    if is_training(TRAINING / name):
        assert settings.run.output_dir.startswith("./output")
        assert Path(plain.arguments[1]).is_relative_to(RECIPES)


@every_script
def test_given_words_and_more_flags_arrive(name: str, shell, tmp_path: Path):
    words = words_for(TRAINING / name, tmp_path)
    command = started(shell(BASH, str(TRAINING / name), *words.values(), "--seed", "77"))
    assert command.arguments[-2:] == ["--seed", "77"]
    for word, value in words.items():
        assert value in command.arguments or value == "true", word
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
    words = words_for(TRAINING / name, tmp_path).values()
    assert shell(BASH, str(TRAINING / name), *words).returncode == 3


RUNS = {"run_step1_sweep.sh": 14, "run_step2_sweep.sh": 7, "run_step3_sweep.sh": 8}


@pytest.mark.slow
@pytest.mark.parametrize("script", SWEEPS, ids=lambda script: script.name)
def test_a_sweep_makes_every_run_in_a_folder_of_its_own(
    script: Path, shell, tmp_path: Path, monkeypatch
):
    models = [""] * len(positional(script)[1])
    process = shell(BASH, linked(script, tmp_path), *models, "--seed", "7")
    assert process.returncode == 0, process.stderr
    _, *runs = process.stdout.split("== run_single.sh ")
    settings = []
    for run in runs:
        call, printed = run.split("\n", 1)
        settings.append(started(CompletedProcess([], 0, printed, "")).settings())
        assert settings[-1].run.seed == 7 and settings[-1].run.output_dir in call
    assert len({s.run.output_dir for s in settings}) == len(runs) == RUNS[script.name]
    monkeypatch.setenv("FAKE_EXIT", "3")
    process = shell(BASH, str(script), *models)
    assert process.returncode == 2 and process.stdout.count("== run_single.sh ") == len(runs)
    assert f"{script.name}: {len(runs)} of the runs failed" in process.stderr


@pytest.mark.slow
def test_a_switch_of_a_sweep_s_run_is_true_or_false(shell):
    script = TRAINING / STEP1 / "single_node/sweep/run_single.sh"
    process = shell(BASH, str(script), "2", "yes")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "error: run_single.sh: OFFLOAD is yes: give true or false\n"
    plain, switched = (
        started(shell(BASH, str(script), "3", switch, switch, "out")).settings()
        for switch in ("false", "true")
    )
    assert (plain.run.engine.offload, plain.model.lora.lora_dim) == (False, 0)
    assert (switched.run.engine.offload, switched.model.lora.lora_dim) == (True, 128)
    assert plain.model.optimizer.weight_decay == switched.model.optimizer.weight_decay == 0


def test_several_nodes_need_a_hostfile(shell, tmp_path: Path, monkeypatch):
    script = str(TRAINING / STEP1 / "multi_node/run_66b.sh")
    command = started(shell(BASH, script, str(tmp_path / "out")))
    assert command.options == ["--hostfile", str(tmp_path / "hosts")]
    monkeypatch.setenv("HOSTFILE", "nowhere")
    process = shell(BASH, script, str(tmp_path / "other"))
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("error: run_66b.sh: HOSTFILE nowhere: no such file; name one")
    assert not (tmp_path / "other").exists()
    monkeypatch.setenv("LAUNCHER", "python")  # which finds its nodes elsewhere
    assert started(shell(BASH, script, str(tmp_path / "out"))).arguments == command.arguments


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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, ""),  # torch's newer name
    ],
)
def test_memory_grows_in_segments_unless_the_user_says_otherwise(
    shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict, expected: str
):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bin/python").write_text('#!/bin/sh\necho "$PYTORCH_CUDA_ALLOC_CONF"\n')
    process = shell(BASH, str(TRAINING / STEP1 / "single_gpu/run_1.3b.sh"))
    assert process.stdout == f"{expected}\n"


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
