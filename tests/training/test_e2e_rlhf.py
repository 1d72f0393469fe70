"""Commands of the steps that e2e_rlhf.py would run; none of them is started."""

from pathlib import Path
from types import ModuleType

import pytest

from dschat.errors import UserError
from tests.helpers.shell import ROOT, STEP1, STEP2, STEP3, TRAINING, fake_launchers, load, started

SEED = ["--seed", "1234"]


@pytest.fixture(scope="module")
def e2e() -> ModuleType:
    return load(ROOT / "e2e_rlhf.py", "e2e_rlhf_under_test")


def plan(e2e: ModuleType, *argv: str) -> dict[int, list[str]]:
    """The command of each step: `bash`, then paths below training/ where they are."""
    commands = e2e.commands(e2e.parse_args([*argv, "--output-dir", "/out"]))
    return {
        step: [word.removeprefix(f"{TRAINING}/") for word in command]
        for step, command in commands.items()
    }


def test_without_a_model_the_embedded_default_runs(e2e: ModuleType):
    quickstart = "training_scripts/quickstart/run.sh"
    sft, reward, ppo = "/out/actor-models", "/out/reward-models", "/out/step3-models"
    assert plan(e2e) == {
        1: [
            *("bash", f"step1_supervised_finetuning/{quickstart}"),
            *("/out/model", "/out/sft", sft, *SEED),
        ],
        2: [
            *("bash", f"step2_reward_model_finetuning/{quickstart}"),
            *(sft, "/out/data", reward, *SEED),
        ],
        3: [
            *("bash", f"step3_rlhf_finetuning/{quickstart}"),
            *(sft, reward, "/out/data", ppo, *SEED),
        ],
    }


@pytest.mark.parametrize("prefix", ["", "facebook/opt-"])
def test_a_size_or_its_id_picks_its_script(e2e: ModuleType, prefix: str):
    models = ["--actor-model", f"{prefix}1.3b", "--reward-model", f"{prefix}350m"]
    assert plan(e2e, *models) == {
        1: ["bash", STEP1 + "single_gpu/run_1.3b.sh", "/out/actor-models", "", *SEED],
        2: ["bash", STEP2 + "single_gpu/run_350m.sh", "/out/reward-models", "", *SEED],
        3: [
            *("bash", STEP3 + "single_gpu/run_1.3b.sh"),
            *("/out/actor-models", "/out/reward-models", "", "", "/out/step3-models", *SEED),
        ],
    }


def test_deployment_and_stages_reach_the_scripts(e2e: ModuleType):
    flags = ["--deployment-type", "single_node", "--actor-zero-stage", "3"]
    argv = ["--actor-model", "1.3b", *flags, "--reward-zero-stage", "1", "--seed", "7"]
    assert plan(e2e, *argv) == {
        1: [
            *("bash", STEP1 + "single_node/run_1.3b.sh", "/out/actor-models", "3"),
            *("--seed", "7"),
        ],
        2: [
            *("bash", STEP2 + "single_node/run_350m.sh", "/out/reward-models", "1"),
            *("--seed", "7"),
        ],
        3: [
            *("bash", STEP3 + "single_node/run_1.3b.sh"),
            *("/out/actor-models", "/out/reward-models", "3", "1", "/out/step3-models"),
            *("--seed", "7"),
        ],
    }


def test_steps_are_chosen_and_come_in_order(e2e: ModuleType):
    assert list(plan(e2e, "--step", "3", "1", "--actor-model", "1.3b")) == [1, 3]
    assert list(plan(e2e, "--step", "2")) == [2]


def test_a_folder_or_another_id_goes_into_the_nearest_script(
    e2e: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shell = fake_launchers(tmp_path, monkeypatch)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "pairs.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    models = ["--actor-model", "./my-model", "--reward-model", "facebook/opt-125m"]
    data = ["--data-path", "./pairs.jsonl", "Dahoas/rm-static"]
    args = e2e.parse_args([*models, *data, "--output-dir", str(out)])
    settings = {
        step: started(shell(*command)).settings() for step, command in e2e.commands(args).items()
    }
    assert settings[1].model_name_or_path == str(tmp_path / "my-model")
    assert settings[2].model_name_or_path == "facebook/opt-125m"
    assert settings[3].roles.actor_model_name_or_path == str(out / "actor-models")
    assert settings[3].roles.critic_model_name_or_path == str(out / "reward-models")
    for step, name in ((1, "actor-models"), (2, "reward-models"), (3, "step3-models")):
        assert settings[step].data.data_path == (str(tmp_path / "pairs.jsonl"), "Dahoas/rm-static")
        assert settings[step].run.output_dir == str(out / name)
        assert settings[step].run.seed == 1234


def test_what_cannot_be_planned_is_said_in_one_line(e2e: ModuleType):
    with pytest.raises(UserError, match="--reward-model needs --actor-model"):
        e2e.parse_args(["--reward-model", "350m"])
    with pytest.raises(UserError, match=r"no script for multi_node in step 1: .*run_1\.3b\.sh"):
        plan(e2e, "--actor-model", "1.3b", "--deployment-type", "multi_node")
