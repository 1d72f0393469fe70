"""Files of pipelines: stages, what flows from one to the next, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.cli import parse
from dschat.errors import UserError
from dschat.pipeline.recipe import EMBEDDED, Pipeline, find, read, shipped

SETTINGS = {"sft": SFTSettings, "reward": RewardSettings, "dpo": DPOSettings, "ppo": RLHFSettings}


def pipeline(folder: Path, text: str, *argv: str) -> Pipeline:
    """The pipeline of a file with this text."""
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read(path, ["--output_dir", str(folder / "out"), *argv], "")


def settings(made: Pipeline) -> dict[str, object]:
    """Each stage's settings, as its program reads them."""
    return {stage.kind: parse(SETTINGS[stage.kind], stage.argv, "") for stage in made.stages}


THREE = """
model: facebook/opt-125m
reward_model: facebook/opt-350m
data_path: [pairs.jsonl]
seed: 7
stages:
  sft: {lora_dim: 8, max_steps: 5}
  reward: {config: reward.yaml, learning_rate: 2e-5}
  ppo: {actor_lora_dim: 4}
"""


def test_models_and_data_flow_from_stage_to_stage(tmp_path: Path):
    (tmp_path / "reward.yaml").write_text("learning_rate: 1.0e-3\nmax_seq_len: 64\n")
    made = pipeline(tmp_path, THREE, "--num_train_epochs", "2")
    sft, reward, ppo = settings(made).values()
    out = tmp_path / "out"
    assert (sft.model_name_or_path, sft.model.lora.lora_dim) == ("facebook/opt-125m", 8)
    assert (reward.model_name_or_path, reward.batch.max_seq_len) == ("facebook/opt-350m", 64)
    assert reward.model.optimizer.learning_rate == 2e-5  # the stage wins over its file
    assert ppo.roles.actor_model_name_or_path == str(out / "actor-models")
    assert ppo.roles.critic_model_name_or_path == str(out / "reward-models")
    for one, folder in ((sft, "actor-models"), (reward, "reward-models"), (ppo, "step3-models")):
        assert one.run.output_dir == str(out / folder)
        assert (one.run.seed, one.run.num_train_epochs) == (7, 2)
        assert one.data.data_path == ("pairs.jsonl",)


def test_columns_of_one_s_own_are_those_of_every_stage(tmp_path: Path):
    """What the message on a row without `prompt` advises."""
    columns = ("prompt=ask", "chosen=good", "rejected=bad")
    text = "model: m\nstages: {sft: , reward: , ppo: }\n"
    made = pipeline(tmp_path, text, "--dataset_columns", *columns)
    assert [one.data.read.dataset_columns for one in settings(made).values()] == [columns] * 3


def test_dpo_starts_from_sft_and_ppo_from_dpo(tmp_path: Path):
    made = pipeline(tmp_path, "model: m\nreward_model: r\nstages: {sft: , dpo: , ppo: }\n")
    _, dpo, ppo = settings(made).values()
    assert dpo.model_name_or_path == str(tmp_path / "out" / "actor-models")
    assert ppo.roles.actor_model_name_or_path == str(tmp_path / "out" / "dpo-models")
    assert ppo.roles.critic_model_name_or_path == "r"


def test_a_reward_model_starts_from_sft_unless_one_is_named(tmp_path: Path):
    made = pipeline(tmp_path, "model: m\nstages: {sft: , reward: }\n")
    assert settings(made)["reward"].model_name_or_path == str(tmp_path / "out" / "actor-models")
    made = pipeline(tmp_path, "model: m\nstages: {sft: , reward: {model_name_or_path: own}}\n")
    assert settings(made)["reward"].model_name_or_path == "own"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\n", "stages: give at least one of sft, reward, dpo, ppo"),
        ("modl: m\nstages: {sft: }\n", "unknown key modl; did you mean model?"),
        ("model: m\nstages: {sftt: }\n", "stages: unknown stage sftt; did you mean sft?"),
        ("model: m\nstages: {sft: {lora_dmi: 4}}\n", "sft: unknown key lora_dmi; did you mean"),
        ("model: m\nstages: {sft: {lora_dim: -1}}\n", "sft: lora_dim is -1: give 0 or more"),
        ("model: m\nstages: {sft: {config: no.yaml}}\n", "config no.yaml: no such file beside"),
        ("model: m\nstages: {sft: 3}\n", "stages: sft is 3: give lines of `flag: value`"),
        ("stages: {sft: }\n", "sft: model_name_or_path is required"),
        ("model: m\nstages: {ppo: }\n", "ppo: critic_model_name_or_path is required"),
        ("model: m\nranks: 0\nstages: {sft: }\n", "ranks is 0: give a whole number in"),
        ("model: m\nstages: {sft: {output_dir: x}}\n", "output_dir: the pipeline gives each stage"),
        ("hardware: multi_node\nhostfile: none\nstages: {sft: }\n", "hostfile none: no such file"),
        ("model: m\nstages: {sft: {rates_of_width: wide}}\n", "rates_of_width is 'wide': give a"),
        (
            "model: m\nstages: {sft: {critic_rates_of_width: 8}}\n",
            "critic_rates_of_width is of ppo",
        ),
        ("hardware: multi_node\nhostfile: .\nstages: {sft: }\n", "hostfile .: no such file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(text: str, message: str, tmp_path: Path):
    with pytest.raises(UserError) as error:
        pipeline(tmp_path, text)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "argv", "lines"),
    [
        (THREE, "", []),
        (THREE, "--seed 8 --save_steps 3 --model m --data_path x", []),
        (
            "model: m\nstages: {sft: {num_train_epochs: 3}, dpo: }\n",
            "--num_train_epochs 2",
            ["--num_train_epochs does nothing in sft, which has its own: 3"],
        ),
        (
            "model: m\nstages: {sft: {data_path: [a, b]}}\n",
            "--data_path c",
            ["--data_path does nothing in sft, which has its own: a b"],
        ),
        (
            "model: m\nstages: {sft: {dataset_columns: [prompt=q]}, dpo: }\n",
            "--dataset_columns prompt=a chosen=b rejected=c",
            ["--dataset_columns does nothing in sft, which has its own: prompt=q"],
        ),
        (
            "stages: {sft: {model_name_or_path: own}}\n",
            "--model m --hostfile x",
            [
                "--model does nothing: no stage starts from it",
                "--hostfile does nothing: it is of hardware multi_node",
            ],
        ),
        (
            "model: m\nreward_model: r\nstages: {sft: , dpo: }\n",
            "",
            ["--reward_model does nothing: no stage starts from it"],
        ),
    ],
)
def test_what_no_stage_uses_is_said(text: str, argv: str, lines: list[str], tmp_path: Path):
    (tmp_path / "reward.yaml").write_text("seed: 3\n")  # a file that a stage begins with yields
    assert list(pipeline(tmp_path, text, *argv.split()).unused) == lines


def test_hardware_decides_the_launcher(tmp_path: Path):
    text = "model: m\nstages: {sft: }\n"
    hosts = tmp_path / "hosts"
    hosts.write_text("node-1 slots=8\n")

    def words(*argv: str) -> tuple[str, ...]:
        (stage,) = pipeline(tmp_path, text, *argv).stages
        assert stage.command[len(stage.command) - len(stage.argv) :] == stage.argv
        return stage.command[: len(stage.command) - len(stage.argv)]

    assert words() == (sys.executable, "-m", "dschat", "sft")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
    assert words("--hardware", "single_node") == (*torchrun, "gpu", "-m", "dschat", "sft")
    assert words("--ranks", "2") == (*torchrun, "2", "-m", "dschat", "sft")
    runner = (sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts))
    several = words("--hardware", "multi_node", "--hostfile", str(hosts))
    assert several == (*runner, "--module", "dschat", "sft")


@pytest.mark.parametrize("name", shipped())
def test_every_pipeline_of_the_library_is_whole(name: str, tmp_path: Path):
    made = read(find(name), ["--output_dir", str(tmp_path)], "")
    stages = settings(made)
    assert {*stages} <= {*SETTINGS}
    folder, size = find(name).parent.name, find(name).stem.removeprefix("run_").split("_")[0]
    if made.settings.model not in (EMBEDDED, None):
        assert made.settings.hardware == folder
        assert size in stages["sft"].model_name_or_path.lower()


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match=r"quikstart: no such file or pipeline; did you mean quick"):
        find("quikstart")


def test_the_embedded_default_makes_its_model_and_data(tmp_path: Path):
    sft, reward, ppo = settings(
        read(find("quickstart"), ["--output_dir", str(tmp_path)], "")
    ).values()
    assert sft.model_name_or_path == str(tmp_path / "model")
    assert sft.data.data_path == (str(tmp_path / "sft"),)
    assert reward.data.data_path == ppo.data.data_path == (str(tmp_path / "data"),)
    assert reward.model_name_or_path == str(tmp_path / "actor-models")


def test_a_model_of_one_s_own_has_the_rates_of_its_width(tmp_path: Path):
    argv = ["--model", "m", "--data_path", "d", "--output_dir", str(tmp_path)]
    made = read(find("own"), argv, "")
    assert made.settings.fit_to_rows
    widths = {stage.kind: stage.widths for stage in made.stages}
    assert widths == {
        **{"sft": {"": 2048}, "reward": {"": 1024}},
        "ppo": {"actor_": 2048, "critic_": 1024},
    }
    sft, reward, ppo = settings(made).values()
    assert (sft.model_name_or_path, sft.data.data_path) == ("m", ("d",))
    assert reward.model_name_or_path == ppo.roles.actor_model_name_or_path
    assert reward.model_name_or_path == str(tmp_path / "actor-models")
