"""DeepSpeed-Chat's scripts: all are here, take its arguments, and set what it sets but for a list.

`dschat_scripts.tsv` has the path of each below training/, its positional arguments and its command.
"""

import csv
import os
import re
from pathlib import Path

import pytest

from dschat.config.cli import parse
from dschat.settings import flag_values, flags_of
from tests.helpers.shell import DPO, STEP1, STEP2, STEP3, TRAINING, Started, fake_launchers, started
from tests.helpers.tiers import tiers
from tests.training.test_scripts import BASH, positional

TABLE = Path(__file__).with_name("dschat_scripts.tsv")
with TABLE.open(encoding="utf-8", newline="") as file:
    ROWS = {row[0]: row[1:] for row in list(csv.reader(file, "excel-tab", quoting=3))[1:]}
OUTPUT_AND_STAGE = ["OUTPUT", "ZERO_STAGE"]
MODELS_STAGES_OUTPUT = [
    *("ACTOR_MODEL_PATH", "CRITIC_MODEL_PATH", "ACTOR_ZERO_STAGE", "CRITIC_ZERO_STAGE", "OUTPUT")
]
COMMANDS = {
    name: command
    for name, (_, command) in ROWS.items()
    if command != "(driver)" and "training_scripts" in name
}
LLAMA1, LLAMA2, LLAMA3 = (step.replace("/opt/", "/llama2/") for step in (STEP1, STEP2, STEP3))
SWEEP = "single_node/sweep/run_single.sh"
SWITCHES = ("OFFLOAD", "LORA", "ENABLE_HYBRID_ENGINE", "MIXED_PRECISION_LORA", "TEST")
SINGLE = [name for name in COMMANDS if name.endswith(SWEEP)]
PLAIN = [name for name in COMMANDS if "/sweep/" not in name and (TRAINING / name).is_file()]
CORE = [STEP1 + "single_node/run_1.3b_lora.sh", STEP3 + "single_node/run_1.3b.sh"]
every_script = pytest.mark.parametrize("name", tiers(PLAIN, CORE))


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    return fake_launchers(tmp_path, monkeypatch)


def run(shell, name: str, *words: str) -> Started:
    return started(shell(BASH, str(TRAINING / name), *words))


def test_every_script_is_there():
    assert [name for name in ROWS if not (TRAINING / name).is_file()] == []


@every_script
def test_positional_arguments_keep_their_places(name: str, shell):
    """Scripts that had none take those of their neighbours, all of them optional in steps 1, 2."""
    required, optional = positional(TRAINING / name)
    if name.startswith("step3"):
        assert [*required, *optional] == MODELS_STAGES_OUTPUT
        settings = run(shell, name, "sft", "reward", "3", "1", "there").settings()
        assert (settings.actor.zero_stage, settings.critic.zero_stage) == (3, 1)
        assert settings.roles.actor_model_name_or_path == "sft"
        assert settings.roles.critic_model_name_or_path == "reward"
    else:
        assert (required, optional) == ([], OUTPUT_AND_STAGE)
        settings = run(shell, name, "there", "3").settings()
        assert settings.model.zero_stage == 3
    assert settings.run.output_dir == "there"
    assert ROWS[name][0] in ("", " ".join([*required, *optional]))


def test_a_run_of_a_sweep_takes_the_arguments_of_deepspeed_chat_s_in_their_order():
    for name in SINGLE:
        required, optional = positional(TRAINING / name)
        assert ROWS[name][0].split() == [*required, *optional], name


# Without effect here, or positional arguments.
EVERYWHERE = {"deepspeed", "actor_model_name_or_path", "critic_model_name_or_path"}
# Flags that differ by intention: rates of adapters, and what the comment beside them says.
LORA = {"learning_rate", "loraplus_lr_ratio", "lora_learning_rate"}
ACTOR_LORA = {f"actor_{flag}" for flag in LORA}
CRITIC_LORA = {f"critic_{flag}" for flag in LORA}
# All answers to one optimizer step in an iteration, where DeepSpeed-Chat added up over iterations.
ONE_ITERATION = {"generation_batches"}
DEPARTURES: dict[str, set[str]] = {
    LLAMA1 + "run_llama2_7b_lora.sh": LORA,
    STEP1 + "multi_node/run_66b.sh": LORA,
    STEP1 + "single_gpu/run_1.3b.sh": LORA,
    STEP1 + "single_gpu/run_6.7b_lora.sh": LORA,
    STEP1 + "single_node/run_1.3b_lora.sh": LORA,
    STEP1 + "single_node/run_13b.sh": LORA,
    STEP1 + "single_node/run_30b_lora.sh": LORA,
    LLAMA2 + "run_llama2_7b_lora.sh": LORA,
    STEP2 + "single_gpu/run_350m.sh": {"learning_rate"},  # the same, written out
    # Rates of DPO by those of its papers.
    DPO + "opt/multi_node/run_350m.sh": {"learning_rate"},
    DPO + "opt/single_gpu/run_350m.sh": {"learning_rate"},
    DPO + "opt/single_node/run_350m.sh": {"learning_rate"},
    DPO + "llama2/run_llama2_7b.sh": {"learning_rate"},
    DPO + "llama2/run_llama2_7b_lora.sh": LORA,
    # The reference is the actor with its adapters off, and no copy to put elsewhere.
    LLAMA3 + "run_llama2_7b_lora.sh": {*ACTOR_LORA, *CRITIC_LORA, "offload_reference_model"},
    LLAMA3 + "run_llama2_7b_mixz.sh": {*ACTOR_LORA, *CRITIC_LORA, "offload_reference_model"},
    STEP3 + "multi_node/run_66b.sh": ACTOR_LORA,
    STEP3 + "single_gpu/run_1.3b.sh": {*ACTOR_LORA, *ONE_ITERATION, "critic_learning_rate"},
    STEP3 + "single_gpu/run_6.7b_lora.sh": {*ACTOR_LORA, *ONE_ITERATION},
    STEP3 + "single_node/run_1.3b_lora.sh": ACTOR_LORA,
    STEP3 + "single_node/run_13b.sh": ACTOR_LORA,
    # Variables without a value in the table: stages; rank and modules of a sweep, and its end.
    STEP3 + "single_node/run_30b_lora.sh": {*ACTOR_LORA, "actor_zero_stage", "critic_zero_stage"},
    STEP1 + SWEEP: {*LORA, "lora_dim", "lora_module_name"},
    DPO + "opt/" + SWEEP: {"learning_rate"},
    STEP3 + SWEEP: {*ACTOR_LORA, "actor_lora_dim", "actor_lora_module_name", "test_stop_step"},
}


def of_deepspeed_chat(name: str, cls: type) -> dict[str, object]:
    """The settings of DeepSpeed-Chat's command, by flag; bare stages are left to their defaults."""
    command = re.sub(r"<(ACTOR|CRITIC)_MODEL_PATH>", "model", COMMANDS[name])
    command = command.replace("<OUTPUT>", "./output")
    if "--zero_stage 0 " in command:
        command = re.sub(r"--offload\b", "", command)  # a switch of sweeps, which needs ZeRO
    words = command.partition("main.py ")[2].split()
    bare = {f"--{flag.name}" for flag in flags_of(cls) if flag.kind.element is not bool}
    pairs = zip(words, [*words[1:], "--"], strict=True)
    words = [word for word, after in pairs if not (word in bare and after.startswith("--"))]
    return flag_values(parse(cls, words, None))


@pytest.mark.parametrize("name", tiers([*PLAIN, *SINGLE], CORE))
def test_a_script_sets_what_deepspeed_chat_s_does_but_for_a_list(name: str, shell):
    words = ["model", "model"] if name.startswith("step3") else []
    _, optional = positional(TRAINING / name)
    if "LORA" in optional:  # with all that it can switch on
        words += ["true" if word in SWITCHES else "" for word in optional]
    here = run(shell, name, *words)
    ours, theirs = flag_values(here.settings()), of_deepspeed_chat(name, type(here.settings()))
    different = {flag for flag in theirs if ours[flag] != theirs[flag]} - EVERYWHERE
    if name.startswith("step3"):  # 100 as there, but in a short run a tenth of it
        assert ours["num_warmup_steps"] is None and theirs.get("num_warmup_steps") in (100, None)
        different -= {"num_warmup_steps"}
    assert different <= DEPARTURES.get(name, set()), different
    launcher = COMMANDS[name].split(" main.py")[0].replace("--num_nodes=1", "").split()
    options = here.options
    if "/multi_node/" in name:
        hostfile, at, *options = options
        assert (hostfile, at) == ("--hostfile", os.environ["HOSTFILE"])
    if "/sweep/" in name and "--master_port" in options:  # as all of step 3 on one machine
        options = options[2:]
    assert [here.launcher, *options] == launcher
