"""Commands of the steps that e2e_rlhf.py would run; none of them is started."""

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from dschat.config import fitting
from dschat.config.cli import parse
from dschat.errors import UserError
from dschat.pipeline.recipe import KINDS, find, read
from dschat.pipeline.run import hold_output
from dschat.settings import flag_values
from dschat.train import run_lock
from tests.helpers.shell import ROOT, STEP1, STEP2, STEP3, TRAINING, fake_launchers, load, started
from tests.helpers.steps import preference_rows, write_rows
from tests.helpers.tiny import save_llama_folder

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
    data += ["--dataset-columns", "prompt=ask", "chosen=good", "rejected=bad"]
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
        assert settings[step].data.read.dataset_columns == (
            "prompt=ask",
            "chosen=good",
            "rejected=bad",
        )
        assert settings[step].run.output_dir == str(out / name)
        assert settings[step].run.seed == 1234


def test_what_cannot_be_planned_is_said_in_one_line(e2e: ModuleType):
    of_a_model = {
        "--reward-model": "350m",
        "--data-path": "x.jsonl",
        "--actor-zero-stage": "3",
        "--reward-zero-stage": "0",
        "--deployment-type": "single_node",
    }
    for flag, value in of_a_model.items():
        with pytest.raises(UserError, match=f"{flag} needs --actor-model: the embedded default"):
            e2e.parse_args([flag, value])


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        ("--step 1 --reward-model r", ["--reward-model does nothing in step 1: it is of step 2"]),
        (
            "--step 3 1 --reward-model r",
            ["--reward-model does nothing in step 1, 3: it is of step 2"],
        ),
        ("--step 2 --reward-model r --reward-zero-stage 1", []),
        (
            "--step 2 --actor-zero-stage 3",
            ["--actor-zero-stage does nothing in step 2: it is of step 1 and 3"],
        ),
        (
            "--step 1 --reward-zero-stage 0",
            ["--reward-zero-stage does nothing in step 1: it is of step 2 and 3"],
        ),
        ("--step 3 --reward-zero-stage 0 --actor-zero-stage 0", []),
        ("--hostfile x", ["--hostfile does nothing: it is of --deployment-type multi_node"]),
        ("--hostfile x --deployment-type multi_node", []),
    ],
)
def test_flags_that_the_chosen_steps_do_not_use_are_said(
    e2e: ModuleType, argv: str, lines: list[str]
):
    args = e2e.parse_args(["--actor-model", "1.3b", *argv.split()])
    assert list(e2e.unused_flags(args)) == lines


@pytest.mark.parametrize("model", ["1.3b", "13b", "./somewhere"])
def test_scripts_that_are_not_there_are_missed_at_once(
    e2e: ModuleType, model, tmp_path, monkeypatch
):
    """Before the output folder is made."""
    monkeypatch.setattr(e2e, "STEP_DIRS", {step: tmp_path / str(step) for step in (1, 2, 3)})
    out = tmp_path / "out"
    argv = ["e2e_rlhf.py", "--actor-model", model, "--deployment-type", "multi_node"]
    monkeypatch.setattr("sys.argv", [*argv, "--output-dir", str(out)])
    with pytest.raises(
        UserError, match=r"multi_node: step 1 has no script for .* choose single_gpu"
    ):
        e2e.main()
    assert not out.exists()


@pytest.mark.parametrize(
    ("actor", "script"),
    [("1.3b", None), ("facebook/opt-1.3b", None), ("30b", "1.3b"), ("./my-model", "1.3b")],
)
def test_a_borrowed_script_is_named(e2e: ModuleType, actor: str, script: str | None):
    args = e2e.parse_args(["--actor-model", actor])
    for step, command in e2e.commands(args).items():
        line = e2e.borrowed(args, step, command)
        if step == 2 or script is None:
            assert line is None
        else:
            assert line == (
                f"no script of its own on single_gpu: run_{script}.sh serves it, whose ZeRO stage, "
                f"adapters and batch sizes are meant for facebook/opt-{script}"
            )


def test_several_machines_have_a_hostfile(e2e: ModuleType, tmp_path: Path, monkeypatch):
    shell, out = fake_launchers(tmp_path, monkeypatch), tmp_path / "out"
    monkeypatch.delenv("HOSTFILE")
    models = ["--actor-model", "66b", "--reward-model", "350m", "--output-dir", str(out)]
    argv = [*models, "--deployment-type", "multi_node", "--hostfile"]
    monkeypatch.setattr("sys.argv", ["e2e_rlhf.py", *argv, str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"^hostfile .*none: no such file; name one, with a line"):
        e2e.main()
    assert not out.exists()
    args = e2e.parse_args([*argv, str(tmp_path / "hosts")])
    monkeypatch.setenv("HOSTFILE", "")  # taken back after the test
    e2e.check_hostfile(args)
    ranks = []  # for which accumulation and epochs are fitted to the rows: not this machine's
    monkeypatch.setattr(e2e, "check_ahead", lambda *given: ranks.append(given[2]))
    e2e.check(args, [])
    assert ranks == [16]
    places = {1: STEP1 + "multi_node/run_66b.sh", 2: STEP2 + "multi_node/run_350m.sh"}
    for step, command in e2e.commands(args).items():
        assert command[1] == str(TRAINING / places.get(step, STEP3 + "multi_node/run_66b.sh"))
        assert e2e.borrowed(args, step, command) is None
        start = started(shell(*command))
        assert start.options[:2] == ["--hostfile", str(tmp_path / "hosts")]
        assert e2e.arguments_of(command) == start.arguments


@pytest.mark.parametrize(
    ("deployment", "size", "script", "width"),
    [
        ("single_gpu", "6.7b", "run_6.7b_lora.sh", 4096),
        ("single_node", "6.7b", "run_6.7b.sh", 4096),
        ("single_node", "13b", "run_13b.sh", 5120),
        ("single_node", "30b", "run_30b_lora.sh", 7168),
        ("multi_node", "66b", "run_66b.sh", 9216),
    ],
)
def test_every_size_has_its_script(e2e: ModuleType, deployment, size, script, width):
    args = e2e.parse_args(["--actor-model", size, "--deployment-type", deployment])
    commands = e2e.commands(args)
    assert [Path(commands[step][1]).name for step in (1, 3)] == [script, script]
    assert {e2e.borrowed(args, step, commands[step]) for step in (1, 2, 3)} == {None}
    assert e2e.widths_of(1, commands[1]) == {"": width}
    assert e2e.widths_of(3, commands[3]) == {"actor_": width, "critic_": 1024}
    assert e2e.widths_of(1, ["bash", "quickstart/run.sh"]) == {}


def test_flags_of_all_steps(e2e: ModuleType):
    flags = ["--num-train-epochs", "3", "--num-warmup-steps", "0", "--overwrite-output-dir"]
    for command in plan(e2e, "--actor-model", "1.3b", *flags).values():
        assert command[-5:] == [
            *("--num_train_epochs", "3", "--num_warmup_steps", "0", "--overwrite_output_dir")
        ]


def test_without_a_model_it_is_the_pipeline_quickstart(e2e: ModuleType, tmp_path: Path):
    args = e2e.parse_args(["--output-dir", str(tmp_path)])
    pipeline = read(find("quickstart"), ["--output_dir", str(tmp_path)], "")
    for stage, of_pipeline in zip(
        e2e.stages(args, e2e.commands(args)), pipeline.stages, strict=True
    ):
        one, other = (
            flag_values(parse(KINDS[stage.kind], made.argv, "")) for made in (stage, of_pipeline)
        )
        assert {name: (one[name], other[name]) for name in one if one[name] != other[name]} == {
            "data_output_path": (f"{stage.folder}/.data", f"{tmp_path}/.data")
        }
        assert stage.folder == of_pipeline.folder


def test_a_script_is_read_without_a_trace(e2e: ModuleType, tmp_path: Path):
    args = e2e.parse_args(["--actor-model", "1.3b", "--output-dir", str(tmp_path / "a b")])
    words = e2e.arguments_of(e2e.commands(args)[3])
    assert words[words.index("--actor_model_name_or_path") + 1] == f"{tmp_path}/a b/actor-models"
    assert words[-2:] == SEED and words.count("--output_dir") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and 128 pairs, with 13 to evaluate on."""
    folder = tmp_path_factory.mktemp("e2e")
    save_llama_folder(folder / "model", max_position_embeddings=512)
    (folder / "data").mkdir()
    write_rows(folder / "data" / "train.jsonl", preference_rows(128, seed=0))
    write_rows(folder / "data" / "test.jsonl", preference_rows(13, seed=1))
    answers = [{"prompt": r["prompt"], "chosen": r["chosen"]} for r in preference_rows(20, seed=0)]
    write_rows(folder / "answers.jsonl", answers)
    return folder


def ahead(e2e: ModuleType, inputs: Path, *argv: str, data: str = "data") -> dict[int, list[str]]:
    """The flags that the checks add to each command."""
    model = str(inputs / "model")
    words = ["--actor-model", model, "--reward-model", model, "--data-path", str(inputs / data)]
    args = e2e.parse_args([*words, "--output-dir", str(inputs / "out"), *argv])
    cache = ["--data_output_path", str(inputs / "cache"), "--data_split", "1"]
    commands = {step: [*command, *cache] for step, command in e2e.commands(args).items()}
    checked = e2e.check(args, e2e.stages(args, commands))
    return {
        step: [*stage.command[len(commands[step]) :]]
        for step, stage in zip(commands, checked, strict=True)
    }


def test_all_steps_are_checked_and_fitted_to_rows_and_model(e2e: ModuleType, inputs: Path, capsys):
    """8 micro-batches of 16 rows; keys and values of rank 16, where the scripts have 128."""
    more = ["--gradient_accumulation_steps", "1", "--num_train_epochs", "3"]
    longer = [*more[:-1], "4"]  # of the 8 that make the 60 steps of a reward model
    # 7.2e-6 * 2048 / 32 of A (step 3: by the root); of all weights 5e-5, times 1024 / 32, and the
    # critic's 5e-6 as much, times 10 for 24 steps
    rates = {
        1: ["--learning_rate", "0.00046"],
        2: ["--learning_rate", "0.0016"],
        3: ["--actor_learning_rate", "5.8e-05"],
    }
    # Answers of at most 10 tokens, and 13 held-out prompts.
    judged = ["--max_answer_seq_len", "16", "--eval_answers_per_prompt", "10"]
    ranks = ["--actor_lora_dim", "16"]
    assert ahead(e2e, inputs) == {
        1: [*rates[1], "--lora_dim", "16", *more],
        2: [*rates[2], *longer],
        3: [*rates[3], *ranks, "--critic_learning_rate", "0.0016", *judged, *more],
    }
    lines = capsys.readouterr().out.splitlines()
    model = inputs / "model"
    assert [line for line in lines if line.startswith("step ")] == [
        f"step {step}: {model}, 128 rows, {steps} optimizer steps"
        for step, steps in ((1, 24), (2, 32), (3, 24))
    ]
    assert sum("no script of its own on single_gpu: run_" in line for line in lines) == 3
    assert lines[-1].startswith("model folders: ") and "free in" in lines[-1]


def test_a_critic_of_few_steps_learns_faster():
    """At most at step 2's rate, ten times the scripts'; from 360 steps on at theirs."""
    found = {steps: fitting.haste(steps) for steps in (1, 36, 120, 360, 5000)}
    assert found == {1: 10.0, 36: 10.0, 120: 3.0, 360: 1.0, 5000: 1.0}


def test_what_the_user_gives_wins(e2e: ModuleType, inputs: Path):
    flags = ["--gradient-accumulation-steps", "4", "--num-warmup-steps", "7"]
    flags += ["--num-train-epochs", "1"]
    chosen = ahead(e2e, inputs, *flags)
    assert chosen[1][2:] == ["--lora_dim", "16"]  # after the rate, that of the model's width
    assert len(chosen[2]) == 2
    assert "--num_warmup_steps" not in chosen[3] and "--num_train_epochs" not in chosen[3]


def test_a_later_step_is_refused_before_the_first(e2e: ModuleType, inputs: Path, monkeypatch):
    with pytest.raises(UserError, match=r"^step 2: .*line 1 has no 'rejected'"):
        ahead(e2e, inputs, data="answers.jsonl")
    with pytest.raises(UserError, match=r"^step 3: .*actor-models' is not a folder"):
        ahead(e2e, inputs, "--step", "3", "--output-dir", str(inputs / "none"))
    with pytest.raises(UserError, match=r"^step 1: num_warmup_steps is -1: give 0 or more"):
        ahead(e2e, inputs, "--num-warmup-steps", "-1")
    reward = inputs / "out" / "reward-models"
    reward.mkdir(parents=True, exist_ok=True)
    (reward / "config.json").touch()
    with pytest.raises(UserError, match=r"^step 2: .*reward-models holds a finished model"):
        ahead(e2e, inputs)
    ahead(e2e, inputs, "--overwrite-output-dir")
    (reward / "config.json").unlink()
    monkeypatch.setattr("dschat.train.disk.free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match=r"will write .* of model folders\), and 1 kB are free"):
        ahead(e2e, inputs)


def test_rows_leave_room_for_the_models(e2e: ModuleType, inputs: Path, monkeypatch):
    """Before they are tokenised."""

    said = r"^step 1: data_output_path .*cache: the tokenised rows of phase 1 take about \d\S+ kB"
    said += r", the models of the run \d\S+ kB, and 100 kB are free"
    free = SimpleNamespace(free=100_000)
    disk = SimpleNamespace(disk_usage=lambda folder: free)
    monkeypatch.setattr("dschat.data.datasets.shutil", disk)
    with pytest.raises(UserError, match=said):
        ahead(e2e, inputs, "--seed", "5")
    free.free = 300_000
    ahead(e2e, inputs, "--seed", "5", "--step", "1")


def test_an_output_folder_that_cannot_be(e2e: ModuleType, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output-dir .*below: Not a directory; give a fold"):
        hold_output(tmp_path / "file" / "below", [], replaces=False, dash="-")


@pytest.mark.parametrize("name", ["actor-models", "reward-models", "step3-models/actor"])
def test_a_finished_step_is_not_replaced(e2e: ModuleType, tmp_path: Path, name: str, monkeypatch):
    """Not even the embedded default's data, which come before the checks."""
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "config.json").touch()
    monkeypatch.setattr("sys.argv", ["e2e_rlhf.py", "--output-dir", str(tmp_path)])
    with pytest.raises(UserError, match="holds a finished model; give another --output-dir, or --"):
        e2e.main()
    run_lock.release()
    assert [path.name for path in tmp_path.iterdir()] == [name.split("/")[0]]
    steps = {"actor-models": "2", "reward-models": "3", "step3-models/actor": "1"}
    for argv in (["--overwrite-output-dir"], ["--step", steps[name]]):
        args = e2e.parse_args([*argv, "--output-dir", str(tmp_path)])
        stages = e2e.stages(args, e2e.commands(args))
        hold_output(tmp_path, stages, args.overwrite_output_dir, dash="-")


def test_a_dry_run_starts_nothing(e2e: ModuleType, inputs: Path, monkeypatch):
    started = []
    monkeypatch.setattr(e2e, "check", lambda args, steps: steps)
    monkeypatch.setattr(
        e2e, "run_all", lambda steps: {s.name: started.append(s.kind) or 1.0 for s in steps}
    )
    argv = ["e2e_rlhf.py", "--actor-model", "1.3b", "--output-dir", str(inputs / "dry")]
    monkeypatch.setattr("sys.argv", [*argv, "--dry-run"])
    e2e.main()
    assert started == []
    monkeypatch.setattr("sys.argv", argv)
    e2e.main()
    assert started == ["sft", "reward", "ppo"]
