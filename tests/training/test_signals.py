"""A signal stops a run after the step that it is in; resumed it ends bit for bit the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.resume_runs import (
    PPO_COMMON,
    REWARD_FULL,
    SFT_LORA,
    Outcome,
    assert_same_end,
    launch_runs,
    stopped,
    write_models,
)

# 14 steps, a line of the log after every one. One line comes before the first step.
SFT = [*SFT_LORA, "--log_every", "1"]
PPO = [*PPO_COMMON, "--dtype", "bf16", "--actor_zero_stage", "3", "--critic_zero_stage", "2"]
ONE_RANK = {
    **stopped(SFT, "sft", ("SIGINT", 0, 3)),
    **stopped([*REWARD_FULL, "--log_every", "1"], "reward", ("SIGTERM", 0, 3)),
}
TWO_RANKS = stopped([*PPO, "--max_train_samples", "12"], "ppo", ("SIGUSR1", 1, 2))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("one-rank")
    write_models(folder)
    return folder, launch_runs(ONE_RANK, folder, ranks=1)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("two-ranks")
    write_models(folder)
    return folder, launch_runs(TWO_RANKS, folder, ranks=2)


def check(folder: Path, outcomes: dict[str, Outcome], name: str, signal: str) -> None:
    assert [o.code for n, o in outcomes.items() if n.split()[0] == name] == [0, 75, 0]
    (saved,) = (folder / f"{name}-stopped" / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    stderr = outcomes[f"{name} stopped"].stderr
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if "stopped by" in line]
    assert lines == [
        f"stopped by {signal} after step {step}: saved in {name}-stopped/checkpoints/{saved.name}, "
        "go on with the same command and --resume"
    ]
    assert f"{saved.name} at step {step}\n" in outcomes[f"{name} resumed"].stdout
    assert_same_end(folder / f"{name}-complete", folder / f"{name}-stopped")


@pytest.mark.slow
@pytest.mark.parametrize("name, signal", [("sft", "SIGINT"), ("reward", "SIGTERM")])
def test_one_rank(one_rank, name, signal):
    check(*one_rank, name, signal)


@pytest.mark.slow
def test_a_signal_of_one_rank_stops_both(two_ranks):
    check(*two_ranks, "ppo", "SIGUSR1")
