"""DPO end to end, in miniature: references, losses, layouts, micro-batches, kills."""

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers.resume_runs import Outcome, assert_same_end, interrupted, launch_runs
from tests.helpers.resume_runs import Run as OneRun
from tests.helpers.rounding import FIGURE, LOGITS
from tests.helpers.steps import DPO, Run, run_worker, write_inputs
from tests.helpers.steps_outputs import (
    assert_all_finite,
    assert_same_weights,
    column,
    evaluation_ids,
    load,
    records,
)
from tests.helpers.tiny import save_llama_folder

pytestmark = pytest.mark.slow

# 27 pairs to train on, 8 a step: 4 steps an epoch; 13 to evaluate on.
COMMON = shlex.split(
    "--model_name_or_path model --data_path data --data_split 4,4,2 --max_seq_len 64 --log_every 1 "
    "--dtype fp32 --num_warmup_steps 0 --deepspeed_config adam.json"
)
LORA = shlex.split("--lora_dim 4 --learning_rate 1e-4")
FULL = shlex.split("--learning_rate 1e-4")
KTO = shlex.split("--lora_dim 4 --learning_rate 1e-4 --loss_type kto --reference precomputed")
EIGHT = "--max_train_samples 8 --num_train_epochs 2"  # all in every step
FRUGAL = shlex.split("--zero_stage 3 --gradient_checkpointing")


def run(
    folder: Path, name: str, flags: list[str], ranks: int, micro: int, more: str = ""
) -> list[object]:
    """A run of 8 pairs an optimizer step, in micro-batches of so many pairs a rank."""
    batch = ["--per_device_train_batch_size", micro, "--per_device_eval_batch_size", 4 // ranks]
    batch += ["--gradient_accumulation_steps", 8 // (micro * ranks)]
    where = ["--data_output_path", folder / "cache", "--output_dir", folder / name]
    return [DPO, *COMMON, *flags, *batch, *where, *shlex.split(more)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(inputs: Path) -> Run:
    folder = inputs / "one"
    plan = [
        run(folder, "lora", LORA, 1, 8),
        run(folder, "lora-halves", LORA, 1, 4),
        run(folder, "lora-kept", LORA, 1, 8, "--reference precomputed"),
        run(folder, "full", FULL, 1, 8),
        run(folder, "kto", KTO, 1, 8),
        run(folder, "kto-eight", KTO, 1, 8, EIGHT),
        run(folder, "kto-micro", KTO, 1, 2, EIGHT),
        run(folder, "orpo", LORA, 1, 8, "--loss_type orpo --max_steps 2 --eval_interval 1"),
        run(folder, "stream", LORA, 1, 8, "--streaming --max_steps 2 --print_loss"),
    ]
    return Run(folder, *run_worker(plan, inputs, ranks=1))


@pytest.fixture(scope="module")
def two_ranks(inputs: Path) -> Run:
    folder = inputs / "two"
    plan = [
        run(folder, "lora", LORA, 2, 4, "--zero_stage 2"),
        run(folder, "lora-3", [*LORA, *FRUGAL], 2, 2),
        run(folder, "full", [*FULL, *FRUGAL], 2, 4),
        run(folder, "kto", KTO, 2, 4, "--zero_stage 1"),
    ]
    return Run(folder, *run_worker(plan, inputs, ranks=2))


def assert_same_path(one: Path, other: Path) -> None:
    """The same losses and figures at every step, and nearly the same weights at the end."""
    names = ("step", "loss", "margin", "logprob_per_token_rejected")
    for kind in ("train", "eval"):
        found, expected = (column(records(folder, kind), *names) for folder in (other, one))
        torch.testing.assert_close(found, expected, rtol=0, atol=10 * LOGITS)
    assert_same_weights(one, other, rate=16e-4)


def test_every_run_ends_well_and_learns(one_rank: Run):
    assert [result.code for result in one_rank.results] == 9 * [0]
    for name in ("lora", "full", "kto", "orpo", "stream"):
        assert_all_finite(one_rank.folder / name)
    for name in ("lora", "full", "kto"):
        evaluation = records(one_rank.folder / name, "eval")
        first, last = evaluation[0], evaluation[-1]
        assert last["loss"] < first["loss"] and last["margin"] > first["margin"] == 0
        assert last["accuracy"] > first["accuracy"] == 0.5


def test_the_reference_is_told(one_rank: Run):
    lines = [x for x in one_rank.printed.splitlines() if x.startswith("reference: ")]
    starts = [
        *2 * ["reference: the model with its adapters off"],
        "reference: log-probabilities of 40 pairs, computed once in",
        "reference: log-probabilities of 40 pairs, read from",  # full: the same base
        "reference: log-probabilities of 40 pairs, computed once in",  # with mismatched answers
        "reference: log-probabilities of 21 pairs, computed once in",
        "reference: log-probabilities of 21 pairs, read from",
        "reference: none, orpo has none",
        "reference: the model with its adapters off",
    ]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines


def test_adapters_alone_are_trained(one_rank: Run, inputs: Path):
    before = load_file(inputs / "model" / "model.safetensors")
    after = load_file(one_rank.folder / "lora" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj." in name}
    rates = column(records(one_rank.folder / "lora", "train"), "lr/lora_A", "lr/lora_B")
    torch.testing.assert_close(rates[:, 1], 16 * rates[:, 0], rtol=FIGURE, atol=0)
    assert (one_rank.folder / "lora" / "adapter" / "adapter_config.json").is_file()


def test_the_saved_model_has_the_log_probabilities_that_were_reported(one_rank: Run, inputs: Path):
    model = load(AutoModelForCausalLM, one_rank.folder / "full")
    reported = records(one_rank.folder / "full", "eval")[-1]
    with torch.no_grad():
        for side in ("chosen", "rejected"):
            sums = []
            for ids, prompt in evaluation_ids(inputs, side):
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                sums.append(sum(logprobs[t - 1, ids[t]].item() for t in range(prompt, len(ids))))
            mean = sum(sums) / len(sums)
            assert mean == pytest.approx(reported[f"logprob_{side}"], abs=10 * LOGITS)


@pytest.mark.parametrize("name, other", [("kto-eight", "kto-micro"), ("lora", "lora-kept")])
def test_micro_batches_and_kinds_of_reference_change_nothing(one_rank: Run, name: str, other: str):
    assert_same_path(one_rank.folder / name, one_rank.folder / other)


@pytest.mark.parametrize(
    "name, other", [("lora", "lora"), ("lora-halves", "lora-3"), ("full", "full"), ("kto", "kto")]
)
def test_one_and_two_ranks_agree(one_rank: Run, two_ranks: Run, name: str, other: str):
    """ZeRO 0 on one rank; on two ZeRO 2, ZeRO 3 with gradient checkpointing, ZeRO 1."""
    assert [result.code for result in two_ranks.results] == 4 * [0]
    assert_same_path(one_rank.folder / name, two_ranks.folder / other)


SAVED = [DPO, *COMMON, *FULL, "--data_output_path", "cache"]
SAVED += shlex.split("--per_device_train_batch_size 4 --gradient_accumulation_steps 2")
OTHER_BASE = ["--model_name_or_path", "other", "--resume", "full-killed/checkpoints/step-000004"]
RUNS = {
    **interrupted(SAVED, "full", save_steps=2, killed=4),
    # The weights that train are in the checkpoint; what they started from is not.
    "another base": OneRun([*SAVED, *OTHER_BASE, "--output_dir", "never"]),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("dpo-killed")
    write_inputs(folder)
    save_llama_folder(folder / "other", seed=5, max_position_embeddings=128)
    return folder, launch_runs(RUNS, folder, ranks=1)


def test_a_killed_run_ends_as_one_that_never_stopped(killed):
    folder, outcomes = killed
    parts = [outcomes[f"full {part}"] for part in ("complete", "killed", "resumed")]
    assert [part.code for part in parts] == [0, -9, 0], [part.stderr[-2000:] for part in parts]
    assert_same_end(folder / "full-complete", folder / "full-killed")


def test_a_resume_on_another_base_is_refused(killed):
    """With all weights in training only the reference knows where they came from."""
    outcome = killed[1]["another base"]
    assert outcome.code == 2
    assert "error: resume: the reference's log-probabilities are those of" in outcome.stderr
