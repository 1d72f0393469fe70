"""Every shipped script hands its arguments to flags that exist; no training is started."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dschat.train.advice import lora_advice
from tests.helpers.shell import STEP1, STEP2, STEP3, TRAINING, fake_launchers, started

SCRIPTS = sorted(TRAINING.rglob("*.sh"))
RECIPES = [script for script in SCRIPTS if "training_scripts" in script.parts]
BASH = shutil.which("bash")

# What the scripts of DeepSpeed-Chat take, for those of them that exist here.
TAKES_OUTPUT_AND_STAGE = ("OUTPUT", "ZERO_STAGE")
TAKES_MODELS_STAGES_OUTPUT = (
    "ACTOR_MODEL_PATH",
    "CRITIC_MODEL_PATH",
    "ACTOR_ZERO_STAGE",
    "CRITIC_ZERO_STAGE",
    "OUTPUT",
)
# script → default ZeRO stage (actor's and critic's in step 3)
DEFAULT_STAGES = {
    STEP1 + "single_gpu/run_1.3b.sh": (0,),
    STEP1 + "single_node/run_1.3b.sh": (2,),
    STEP1 + "single_node/run_1.3b_lora.sh": (0,),
    STEP2 + "single_gpu/run_350m.sh": (0,),
    STEP2 + "single_node/run_350m.sh": (0,),
    STEP3 + "single_gpu/run_1.3b.sh": (0, 0),
    STEP3 + "single_node/run_1.3b.sh": (2, 2),
    STEP3 + "single_node/run_1.3b_lora.sh": (0, 0),
}


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


def name_of(script: Path) -> str:
    return str(script.relative_to(TRAINING))


@pytest.fixture(params=SCRIPTS, ids=name_of)
def script(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_step_ships_scripts():
    assert {script.relative_to(TRAINING).parts[0][:5] for script in RECIPES} >= {
        "step1",
        "step2",
        "step3",
    }
    assert {name for name in DEFAULT_STAGES if not (TRAINING / name).is_file()} == set()


def test_a_script_is_sound_bash_in_the_house_form(script: Path):
    assert subprocess.run([BASH, "-n", script], check=False).returncode == 0
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    commands = [line for line in lines if line.strip() and not line.startswith("#")]
    assert commands[0] == "set -euo pipefail"
    last = commands[-1].strip()
    if "training_scripts" in script.parts:  # the screen and the log both get the output
        assert last == '"$@" 2>&1 | tee -a "$OUTPUT/training.log"'
    else:
        assert last == '"$@"'


def test_defaults_and_empty_words_mean_the_same(script: Path, shell):
    required, optional = positional(script)
    models = [f"some/{name.lower()}" for name in required]
    plain = started(shell(BASH, str(script), *models))
    empty = started(shell(BASH, str(script), *models, *["" for _ in optional]))
    assert plain == empty
    assert plain.program.is_file()
    assert plain.program.parent == TRAINING / script.relative_to(TRAINING).parts[0]
    settings = plain.settings()
    if "training_scripts" in script.parts:
        assert settings.run.output_dir == "./output"


def test_given_words_and_more_flags_arrive(script: Path, shell, tmp_path: Path):
    required, optional = positional(script)
    # A space in each word: one that is not quoted would fall apart.
    words = {name: str(tmp_path / name.lower() / "with space") for name in [*required, *optional]}
    words |= {name: "1" for name in words if name.endswith("ZERO_STAGE")}
    command = started(shell(BASH, str(script), *words.values(), "--seed", "77"))
    assert command.arguments[-2:] == ["--seed", "77"]
    for name, word in words.items():
        assert word in command.arguments, name
    settings = command.settings()
    if "training_scripts" in script.parts:
        assert settings.run.seed == 77
        assert settings.run.output_dir == words["OUTPUT"]
        assert Path(words["OUTPUT"], "training.log").read_text().splitlines()[-1] == "77"
    else:
        assert getattr(settings, "evaluation", settings).seed == 77


def test_a_missing_required_word_is_told_by_its_place(script: Path, shell):
    required, _ = positional(script)
    for count in range(len(required)):
        process = shell(BASH, str(script), *["x"] * count)
        assert process.returncode != 0
        assert process.stdout == ""  # nothing was started
        assert re.search(rf": {count + 1}: (the|a) \w+", process.stderr), process.stderr


def test_a_failed_run_fails_the_script(
    script: Path, shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_EXIT", "3")  # must not be hidden by the pipe to the log
    required, optional = positional(script)
    words = [str(tmp_path / "out") if name == "OUTPUT" else "2" for name in [*required, *optional]]
    assert shell(BASH, str(script), *words).returncode == 3


@pytest.mark.parametrize("name", DEFAULT_STAGES)
def test_the_arguments_of_deepspeed_chat_keep_their_places(name: str, shell):
    script = TRAINING / name
    required, optional = positional(script)
    stages = DEFAULT_STAGES[name]
    if len(stages) == 1:
        assert (*required, *optional) == TAKES_OUTPUT_AND_STAGE
        default = started(shell(BASH, str(script))).settings()
        other = started(shell(BASH, str(script), "there", "3")).settings()
        assert (default.model.zero_stage,) == stages
        assert other.model.zero_stage == 3
    else:
        assert (*required, *optional) == TAKES_MODELS_STAGES_OUTPUT
        default = started(shell(BASH, str(script), "sft", "reward")).settings()
        other = started(shell(BASH, str(script), "sft", "reward", "3", "1", "there")).settings()
        assert (default.actor.zero_stage, default.critic.zero_stage) == stages
        assert (other.actor.zero_stage, other.critic.zero_stage) == (3, 1)
        assert other.roles.actor_model_name_or_path == "sft"
        assert other.roles.critic_model_name_or_path == "reward"
    assert default.run.output_dir == "./output"
    assert other.run.output_dir == "there"


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


@pytest.mark.parametrize("script", [s for s in RECIPES if "opt" in s.parts], ids=name_of)
def test_adapters_of_shipped_scripts_follow_the_advice(script: Path, shell):
    """The quickstart is left out: its rates are tuned to its own small model."""
    models = [f"some/{name.lower()}" for name in positional(script)[0]]
    settings = started(shell(BASH, str(script), *models)).settings()
    roles = [getattr(settings, role, None) for role in ("model", "actor", "critic")]
    ranks = 1 if "single_gpu" in script.parts else 8
    for model in filter(None, roles):
        engine = settings.run.engine_config(model, "bf16", micro_batch=1)
        rates = model.optimizer
        size = rates.full_rate_size
        assert lora_advice(model.lora, rates, engine, ranks, size) == []
