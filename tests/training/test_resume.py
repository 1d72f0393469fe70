"""Killed and resumed runs of the three steps end as runs that never stopped, bit for bit."""

import json
import sys
from pathlib import Path

import pytest

import tests.helpers
from tests.helpers.resume_runs import (
    GRPO_KNOBS,
    LORA,
    MODEL,
    PPO_COMMON,
    REWARD_FULL,
    SFT_LORA,
    TIMES,
    Outcome,
    Run,
    assert_same_end,
    figures,
    interrupted,
    launch_runs,
    while_saving,
    write_models,
)
from tests.helpers.rounding import FIGURE, LOGITS
from tests.helpers.steps import REWARD

SAVING = ["--save_steps", "3", "--output_dir", "sft-killed"]
RESUMED = [*SFT_LORA, *SAVING, "--resume"]
LAST = "sft-killed/checkpoints/step-000012"
FROM_LAST = ["--resume", LAST, "--output_dir", "other"]
NEW_RATES = ["--learning_rate", "5e-4", "--loraplus_lr_ratio", "8"]
FROM_BROKEN = [*SFT_LORA, "--resume", "broken", "--output_dir", "never"]
COPY = f"cp -r {LAST} broken"
AGAIN = f"rm -r broken && {COPY}"
DAMAGE = f"{sys.executable} {Path(tests.helpers.__file__).parent / 'damage.py'}"
WEIGHTS = "model/mp_rank_00_model_states.pt"

# 13 prompts, 2 x 2 an iteration: 4 iterations, the last of one row, with an evaluation (which
# samples) amid them.
SAMPLING = ["--dtype", "fp32", "--ppo_epochs", "2", "--generation_batches", "2"]
SAMPLING += ["--eval_interval", "2"]
# The critic's warm-up ends, the coefficient moves and updates end early before and after the kill.
SAMPLING += ["--critic_warmup_iterations", "1", "--kl_target", "0.5", "--kl_horizon", "8"]
SAMPLING += ["--update_kl_limit", "1e-5"]

PPO_RESUMED = ["--save_steps", "1", "--output_dir", "ppo-killed", "--resume"]

RATIO = Run([*SFT_LORA, *FROM_LAST, "--loraplus_lr_ratio", "8"])
KILLED_ONCE = {**interrupted(SFT_LORA, "sft", save_steps=3, killed=6), "ratio": RATIO}
STEP_1 = {
    "sft complete": Run([*SFT_LORA, "--output_dir", "sft-complete"]),
    "sft killed": Run([*SFT_LORA, *SAVING], while_saving(6)),
    # Step 6 is in place and step 3 half removed.
    "sft killed again": Run(RESUMED, ("os.rename", "*/.step-000003.old.tmp")),
    # The finished model is complete and not yet in its place.
    "sft killed at the end": Run(RESUMED, ("os.rename", "sft-killed/.model.new")),
    "sft resumed": Run(RESUMED),
    "new rates": Run(
        [*SFT_LORA, *FROM_LAST, *NEW_RATES, "--resume_with_new_rates", "--output_dir", "new-rates"]
    ),
    "setting": Run([*SFT_LORA, *FROM_LAST, "--gradient_clipping", "0.5"]),
    "other step": Run([REWARD, *MODEL, *LORA, "--dtype", "fp32", *FROM_LAST]),
    "other rows": Run(
        [*SFT_LORA, *FROM_LAST], shell="cp -r data saved && sed -i 's/ now/ then/' data/train.jsonl"
    ),
    "two processes": Run(
        FROM_BROKEN, shell=f"rm -r data && mv saved data && {COPY} && {DAMAGE} broken processes 2"
    ),
    "damaged file": Run(FROM_BROKEN, shell=f"{AGAIN} && {DAMAGE} broken flip random-rank-0000.pt"),
    "foreign code": Run(
        FROM_BROKEN, shell=f"{AGAIN} && {DAMAGE} broken payload {WEIGHTS} $PWD/code-ran"
    ),
    "older checkpoint": Run(
        [*SFT_LORA, "--resume", "--output_dir", "two"],
        shell=f"mkdir -p two/checkpoints && cp -r {LAST} two/checkpoints/step-000012 && "
        f"cp -r {LAST} two/checkpoints/step-000013 && "
        f"{DAMAGE} two/checkpoints/step-000013 flip {WEIGHTS}",
    ),
    "fresh start": Run([*SFT_LORA, *SAVING, "--overwrite_output_dir"]),
}
STEPS_2_AND_3 = {
    **interrupted(REWARD_FULL, "reward", save_steps=4, killed=8),
    **interrupted([*PPO_COMMON, *SAMPLING], "ppo", save_steps=1, killed=3),
    **interrupted(GRPO_KNOBS, "grpo", save_steps=1, killed=3),
    "edited function": Run(
        [*PPO_COMMON, *SAMPLING, *PPO_RESUMED], shell="echo '# another' >> own_rewards.py"
    ),
    "other text": Run(
        [*PPO_COMMON, *SAMPLING, *PPO_RESUMED],
        shell="sed -i '$d' own_rewards.py && sed -i 's/make/give/' texts.jsonl",
    ),
    "other statistics": Run(
        [*PPO_COMMON, *SAMPLING, *PPO_RESUMED],
        shell="sed -i 's/give/make/' texts.jsonl && sed -i 's/1.5/1.6/' "
        "critic/reward_statistics.json",
    ),
}
# Two iterations: generation that gathers every layer from two ranks takes its time.
SHARDED = ["--dtype", "bf16", "--critic_lora_dim", "4", "--max_train_samples", "8"]
SHARDED += ["--actor_zero_stage", "3", "--critic_zero_stage", "2"]
TWO_RANKS = {
    **interrupted([*PPO_COMMON, *SHARDED], "ppo", save_steps=1, killed=2),
    **interrupted(
        [*GRPO_KNOBS, "--num_train_epochs", "2", "--actor_zero_stage", "2"],
        "grpo",
        save_steps=1,
        killed=3,
    ),
}


def run_all(runs: dict[str, Run], folder: Path, ranks: int) -> tuple[Path, dict[str, Outcome]]:
    write_models(folder)
    return folder, launch_runs(runs, folder, ranks)


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    return run_all(KILLED_ONCE, tmp_path_factory.mktemp("once"), ranks=1)


@pytest.fixture(scope="module")
def step_1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    return run_all(STEP_1, tmp_path_factory.mktemp("step-1"), ranks=1)


@pytest.fixture(scope="module")
def steps_2_and_3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    return run_all(STEPS_2_AND_3, tmp_path_factory.mktemp("steps-2-and-3"), ranks=1)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    return run_all(TWO_RANKS, tmp_path_factory.mktemp("two-ranks"), ranks=2)


def codes(outcomes: dict[str, Outcome], name: str) -> list[int]:
    runs = {n: o for n, o in outcomes.items() if n.split()[0] == name}
    for outcome in runs.values():
        assert outcome.code in (0, -9), outcome.stderr[-3000:]
    return [outcome.code for outcome in runs.values()]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_step_1_resumes_after_a_kill_in_a_save(killed_once):
    folder, outcomes = killed_once
    assert codes(outcomes, "sft") == [0, -9, 0]
    assert "sft-killed/checkpoints/step-000003 at step 3\n" in outcomes["sft resumed"].stdout
    assert_same_end(folder / "sft-complete", folder / "sft-killed")


@pytest.mark.slow
def test_step_1_survives_three_kills(step_1):
    """In a save, in removing a checkpoint, and while the model takes the output folder's place."""
    folder, outcomes = step_1
    assert codes(outcomes, "sft") == [0, -9, -9, -9, 0]
    resumed = [outcomes[name].stdout for name in ("sft killed again", "sft killed at the end")]
    resumed.append(outcomes["sft resumed"].stdout)
    for step, text in zip((3, 6, 12), resumed, strict=True):
        assert f"resumed from sft-killed/checkpoints/step-{step:06d} at step {step}\n" in text
    assert "sft-killed: put the finished model of a killed run in place\n" in resumed[-1]
    assert_same_end(folder / "sft-complete", folder / "sft-killed")
    assert checkpoints(folder / "sft-killed") == ["step-000012"]  # and no leftovers


@pytest.mark.slow
def test_step_2_with_all_weights_in_bf16_at_zero_2(steps_2_and_3):
    folder, outcomes = steps_2_and_3
    assert codes(outcomes, "reward") == [0, -9, 0]
    assert "at step 4\n" in outcomes["reward resumed"].stdout
    assert_same_end(folder / "reward-complete", folder / "reward-killed")


@pytest.mark.slow
def test_step_3_with_a_moving_average(steps_2_and_3):
    """Sampling, mini-batch order, text and the average go on; the reward model is a copy."""
    folder, outcomes = steps_2_and_3
    assert codes(outcomes, "ppo") == [0, -9, 0]
    assert "at step 2\n" in outcomes["ppo resumed"].stdout
    assert {path.name for path in (folder / "ppo-complete").iterdir()} >= {"actor_ema", "critic"}
    steps = [line for line in figures(folder / "ppo-complete") if "actor_updates" in line]
    assert [line["actor_updates"] > 0 for line in steps] == [False, True, True, True]
    assert all(line["actor_updates"] < 1 for line in steps)
    assert len({line["kl_coefficient"] for line in steps}) == 3  # the warm-up's is the first
    assert_same_end(folder / "ppo-complete", folder / "ppo-killed")
    answers = [
        (folder / name / "answers.jsonl").read_text() for name in ("ppo-complete", "ppo-killed")
    ]
    assert answers[0] == answers[1] and answers[0].count("\n") == 3 * 3 + 2
    last = [line for line in figures(folder / "ppo-complete") if line["kind"] == "train"][-1]
    scaled = (last["reward_model"] - 0.2) / 1.5
    assert last["reward"] == pytest.approx(scaled + last["reward_function"], abs=LOGITS)
    assert last["ptx_loss"] > 0


def iterations_of_grpo(folder, outcomes) -> list[dict]:
    """The figures of a run's iterations, which are also those of its killed and resumed twin."""
    assert codes(outcomes, "grpo") == [0, -9, 0]
    assert "at step 2\n" in outcomes["grpo resumed"].stdout
    assert_same_end(folder / "grpo-complete", folder / "grpo-killed")
    return [line for line in figures(folder / "grpo-complete") if line["kind"] == "train"]


@pytest.mark.slow
def test_step_3_with_every_knob_of_grpo(steps_2_and_3):
    """Spare prompts are drawn before and after the kill; cut and unscored answers are left out."""
    steps = iterations_of_grpo(*steps_2_and_3)
    assert min(steps[0]["resampled"], steps[2]["resampled"]) > 0  # one before the kill, one after
    assert all(0 < line["masked"] < 1 and line["actor_updates"] > 0 for line in steps[:3])
    assert all({"rewards/odd", "answer_clip_fraction_high"} <= line.keys() for line in steps)


@pytest.mark.slow
def test_step_3_on_two_ranks_at_zero_3_in_bf16(two_ranks):
    folder, outcomes = two_ranks
    assert codes(outcomes, "ppo") == [0, -9, 0]
    assert_same_end(folder / "ppo-complete", folder / "ppo-killed")
    files = {path.name for path in next((folder / "ppo-killed/checkpoints").iterdir()).iterdir()}
    assert {"ema-rank-0000.pt", "ema-rank-0001.pt", "random-rank-0001.pt"} <= files


@pytest.mark.slow
def test_every_knob_of_grpo_on_two_ranks(two_ranks):
    """Each rank draws spare prompts of its own; both go on where they stood."""
    steps = iterations_of_grpo(*two_ranks)
    assert len(steps) == 4 and all(line["actor_updates"] > 0 for line in steps)
    assert any(line["resampled"] > 0 for line in steps[:2])
    assert any(line["resampled"] > 0 for line in steps[2:])


def test_another_ratio_is_refused(killed_once):
    _, outcomes = killed_once
    assert outcomes["ratio"].error == (
        f"error: resume {LAST}: saved with loraplus_lr_ratio 16, now 8; give 16, "
        "or resume_with_new_rates to continue with 8"
    )


@pytest.mark.slow
def test_new_rates_go_into_optimizer_and_schedule(step_1):
    """At the same point of the schedule: A at half of its rate, B at eight times that."""
    folder, outcomes = step_1
    assert outcomes["new rates"].code == 0, outcomes["new rates"].stderr[-3000:]
    before, after = (figures(folder / name) for name in ("sft-complete", "new-rates"))
    assert [(r["kind"], r["step"]) for r in before] == [(r["kind"], r["step"]) for r in after]
    assert before[:-2] == after[:-2]  # lines 14 are new: one of training, one of evaluation
    assert after[-2]["lr/lora_A"] == pytest.approx(before[-2]["lr/lora_A"] / 2, rel=FIGURE)
    assert after[-2]["lr/lora_B"] == pytest.approx(8 * after[-2]["lr/lora_A"], rel=FIGURE)
    assert after[-2]["loss"] != before[-2]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, message",
    [
        ("setting", "saved with gradient_clipping 1.0, now 0.5; give 1.0, nothing overrides it"),
        ("other step", "a checkpoint of step 1 (SFT), this is step 2 (reward model)"),
        ("other rows", "the rows of data_path data have changed (digest "),
        ("two processes", "saved by 2 processes, now there are 1; start 2, each holds"),
        ("damaged file", "random-rank-0000.pt is damaged; remove the folder"),
        ("fresh start", "holds checkpoints of an earlier run (step-000012); give resume"),
    ],
)
def test_what_step_1_refuses_before_weights_are_read(step_1, name, message):
    _, outcomes = step_1
    assert message in outcomes[name].error


@pytest.mark.slow
def test_code_in_a_checkpoint_does_not_run(step_1):
    folder, outcomes = step_1
    assert outcomes["foreign code"].code == 2
    line = f"error: broken/{WEIGHTS}: refused, it holds more than tensors and numbers"
    assert line in outcomes["foreign code"].stderr
    assert not (folder / "code-ran").exists()


@pytest.mark.slow
def test_an_older_checkpoint_stands_in_for_a_damaged_one(step_1):
    _, outcomes = step_1
    outcome = outcomes["older checkpoint"]
    assert outcome.code == 0, outcome.stderr[-3000:]
    assert f"step-000013: {WEIGHTS} is damaged" in outcome.stdout
    assert "trying step-000012" in outcome.stdout
    assert "resumed from two/checkpoints/step-000012 at step 12" in outcome.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, message",
    [
        ("edited function", "source of reward_function own_rewards:length was "),
        ("other text", "rows of unsupervised_dataset_name texts.jsonl was "),
        ("other statistics", "std of reward_scaling saved was 1.5, now 1.6; a resumed run"),
    ],
)
def test_what_step_3_refuses_before_weights_are_read(steps_2_and_3, name, message):
    _, outcomes = steps_2_and_3
    assert message in outcomes[name].error


def test_the_record_is_for_people(killed_once):
    folder, _ = killed_once
    record = json.loads((folder / LAST / "state.json").read_text())
    assert (record["step"], record["epoch"], record["batch"]) == (12, 1, 10)
    model = record["engines"]["model"]
    assert model["loraplus_lr_ratio"] == 16.0
    assert model["peak_rates"] == {"lora_A": 1e-3, "lora_B": 16e-3}
    assert model["parameters"]["lora_A"]["model.layers.0.mlp.down_proj.lora_A"] == [4, 48]
    assert record["settings"]["lora_dim"] == 4 and record["settings"]["dtype"] == "fp32"


def test_the_clock_alone_differs(killed_once):
    """The comparison leaves out figures of time, and nothing else."""
    folder, _ = killed_once
    line = json.loads((folder / "sft-killed/metrics.jsonl").read_text().splitlines()[1])
    left = {name for name in line if not name.startswith(TIMES)}
    assert left == {"kind", "step", "loss", "lr/lora_A", "lr/lora_B"} | (left & {"grad_norm"})
