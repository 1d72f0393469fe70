"""The steps end to end, in miniature: one rank, two ranks, and the deepspeed launcher."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers.rounding import FIGURE, LOGITS, NEAR_ONE
from tests.helpers.steps import (
    DPO,
    PPO,
    PROMPT_EVALUATION,
    REWARD,
    REWARD_EVALUATION,
    ROOT,
    SFT,
    Run,
    free_port,
    launch,
    preference_rows,
    run_worker,
    write_inputs,
    write_rows,
)
from tests.helpers.steps_outputs import (
    assert_all_finite,
    assert_on_policy,
    assert_same_weights,
    column,
    evaluation_ids,
    load,
    records,
)

DATA = ["--data_path", "data", "--data_split", "4,4,2"]  # 27, 27 and 13 of 67 rows
SHORT = ["--max_seq_len", "64", "--log_every", "1"]
LORA = ["--lora_dim", "4", "--learning_rate", "1e-3"]
# 8 rows a step on any number of ranks; 27 and 13 rows do not divide into these.
GLOBAL_BATCH, EVAL_BATCH = 8, 4
PPO_LENGTHS = ["--max_prompt_seq_len", "48", "--max_answer_seq_len", "8"]
PPO_RATES = ["--actor_learning_rate", "1e-3", "--critic_learning_rate", "1e-3"]


def cache(folder: Path) -> list[object]:
    return ["--data_output_path", folder / "cache"]


def sft_fp32(folder: Path, ranks: int) -> list[object]:
    """Two epochs of step 1 that come out the same on any number of ranks."""
    batch = ["--per_device_train_batch_size", GLOBAL_BATCH // ranks]
    batch += ["--per_device_eval_batch_size", EVAL_BATCH // ranks, "--num_train_epochs", 2]
    argv = [SFT, "--model_name_or_path", "model", *DATA, *cache(folder), *SHORT, *LORA, *batch]
    argv += ["--dtype", "fp32", "--deepspeed_config", folder.parent / "adam.json"]
    return [*argv, "--output_dir", folder / "sft"]


def sft_in_other_batches(folder: Path, ranks: int) -> list[list[object]]:
    """Step 1 on packed rows; on batches by tokens, two of them a step on either; on a stream."""
    argv = sft_fp32(folder, ranks)[:-1]
    packed = [*argv, folder / "sft-packed", "--packing"]
    packed += ["--per_device_train_batch_size", 2 // ranks, "--max_seq_len", "80"]
    tokens = [*argv, folder / "sft-tokens", "--max_tokens_per_batch", "160"]
    tokens += ["--gradient_accumulation_steps", 2 // ranks, "--max_steps", "5"]
    stream = [*argv, folder / "sft-stream", "--streaming", "--max_steps", "6"]
    return [packed, tokens, [*stream, "--num_train_epochs", "1"]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    write_inputs(folder)
    rows = preference_rows(20, seed=2)
    subsets = ["long"] * 7 + ["short"] * 13
    bench = [row | {"subset": name} for row, name in zip(rows, subsets, strict=True)]
    write_rows(folder / "bench.jsonl", bench)
    return folder


@pytest.fixture(scope="module")
def one_rank(inputs: Path) -> Run:
    """All three steps and both evaluations: fp32, LoRA+, no ZeRO; the later ones from adapters."""
    folder = inputs / "one"
    fp32 = [*DATA, *cache(folder), "--dtype", "fp32"]
    batch = ["--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "4"]
    generation = ["--per_device_generation_batch_size", "8", "--num_warmup_steps", "0"]
    generation += ["--per_device_training_batch_size", "4", "--gradient_accumulation_steps", "2"]
    sft, reward, tensorboard = folder / "sft", folder / "reward", folder / "tensorboard"
    actor, critic = sft / "adapter", reward / "adapter"
    models = ["--actor_model_name_or_path", actor, "--critic_model_name_or_path", critic]
    compared = ["--model_name_or_path_baseline", "model", "--model_name_or_path_finetune", actor]
    plan = [
        [*sft_fp32(folder, 1), "--enable_tensorboard", "--tensorboard_path", tensorboard],
        [REWARD, "--model_name_or_path", sft, *fp32, *SHORT, *LORA, *batch, "--output_dir", reward],
        [PPO, *models, *fp32, *PPO_LENGTHS, *PPO_RATES, *generation, "--actor_lora_dim", "4"],
        [REWARD_EVALUATION, "--model_name_or_path", critic, "--output_dir", folder / "again"],
        [PROMPT_EVALUATION, *compared, "--prompts", "1 and 2?", "--max_new_tokens", "3"],
    ]
    plan[2] += ["--critic_lora_dim", "4", "--output_dir", folder / "ppo"]
    plan += sft_in_other_batches(folder, 1)
    dpo = [DPO, "--model_name_or_path", sft, *fp32, *SHORT, *LORA, *batch, "--max_steps", "2"]
    plan.append([*dpo, "--output_dir", folder / "dpo"])
    plan.append([*grpo_on_sums(inputs, folder), "--output_dir", folder / "grpo"])
    full = [REWARD, "--model_name_or_path", sft, *fp32, *SHORT, *batch, "--max_steps", "1"]
    plan.append([*full, "--share_prompts", "--output_dir", folder / "full"])
    again = ["--show", "0", "--all_rows", "--output_dir", folder / "bench"]
    bench = ["--data_path", "bench.jsonl", *cache(folder), "--max_seq_len", "64"]
    plan += [
        [REWARD_EVALUATION, "--model_name_or_path", folder / "full", "--output_dir", folder / "x"],
        [REWARD_EVALUATION, "--model_name_or_path", critic, *bench, *again],
    ]
    return Run(folder, *run_worker(plan, inputs, ranks=1))


def grpo_on_sums(inputs: Path, folder: Path) -> list[object]:
    """GRPO on rows of GSM8K's shape, judged by built-in checks and by a function of columns."""
    sums = [{"question": f"{n} + 1?", "answer": f"... \n#### {n + 1}"} for n in range(8)]
    write_rows(inputs / "sums.jsonl", sums)
    (inputs / "sum_rewards.py").write_text(
        "def digits(prompts, answers, answer, **columns):\n"
        "    assert all(text.startswith('... ') for text in answer)\n"
        "    assert columns['question'][0].split()[0] in prompts[0]\n"
        "    return [sum(map(str.isdigit, text)) / 8 or None for text in answers]\n"
    )
    argv = [PPO, "--actor_model_name_or_path", "model", "--data_path", "sums.jsonl"]
    argv += [*cache(folder), *PPO_LENGTHS, "--dtype", "fp32", "--actor_learning_rate", "1e-3"]
    argv += ["--advantage_estimator", "grpo", "--answers_per_prompt", "4", "--print_answers"]
    argv += ["--per_device_generation_batch_size", "4", "--num_warmup_steps", "0"]
    functions = ["exact_number", "sum_rewards:digits", "length", "--reward_length", "0", "30"]
    return [*argv, "--reward_function", *functions, "--reward_function_weight", "1", "0.5", "0.1"]


@pytest.fixture(scope="module")
def two_ranks(inputs: Path) -> Run:
    """The same step 1 in ZeRO 2; then all three steps in bf16."""
    folder = inputs / "two"
    data = [*DATA, *cache(folder)]
    saving = ["--dtype", "bf16", "--gradient_accumulation_steps", "2"]
    frugal = [*saving, *SHORT, "--gradient_checkpointing", "--learning_rate", "1e-3"]
    frugal += ["--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2"]
    sft, reward = folder / "sft-bf16", folder / "reward-bf16"
    models = ["--actor_model_name_or_path", sft, "--critic_model_name_or_path", reward]
    roles = ["--actor_zero_stage", "3", "--critic_zero_stage", "2", "--enable_ema"]
    roles += ["--actor_gradient_checkpointing", "--critic_gradient_checkpointing"]
    generation = ["--per_device_generation_batch_size", "4", "--num_warmup_steps", "0"]
    generation += ["--per_device_training_batch_size", "2", "--output_dir", folder / "ppo"]
    no_file = ["--data_path", "./nothing.jsonl"]
    plan = [
        [*sft_fp32(folder, 2), *no_file],
        [*sft_fp32(folder, 2), "--zero_stage", "2"],
        [SFT, "--model_name_or_path", "model", *data, *frugal, "--zero_stage", "2"],
        [REWARD, "--model_name_or_path", sft, *data, *frugal, "--zero_stage", "3"],
        [PPO, *models, *data, *PPO_LENGTHS, *PPO_RATES, *saving, *roles, *generation],
    ]
    plan[2] += ["--output_dir", sft]
    plan[3] += ["--output_dir", reward]
    return Run(folder, *run_worker(plan, inputs, ranks=2))


@pytest.fixture(scope="module")
def two_ranks_again(inputs: Path, one_rank: Run) -> Run:
    """Under torchrun: the reward model again in ZeRO 3; step 1 in other batches."""
    folder = inputs / "two-again"
    again = [REWARD, "--model_name_or_path", one_rank.folder / "reward/adapter", *DATA, *SHORT]
    again += [*cache(folder), "--dtype", "fp32", "--zero_stage", "3", "--max_train_samples", "8"]
    again += ["--per_device_eval_batch_size", "3", "--output_dir", folder / "reward"]
    plan = [again, *sft_in_other_batches(folder, 2)]
    return Run(folder, *run_worker(plan, inputs, ranks=2, name="again", torchrun=True))


def test_every_program_runs_on_one_rank(one_rank: Run):
    assert [result.code for result in one_rank.results] == 13 * [0]
    for name in ("sft", "reward", "ppo", "dpo", "grpo"):
        assert_all_finite(one_rank.folder / name)
    assert list((one_rank.folder / "tensorboard").glob("events.out.tfevents.*"))


def test_steps_and_evaluations_are_recorded(one_rank: Run):
    # 27 rows in batches of 8 are 4 steps an epoch; evaluated before and after each epoch.
    for name, steps, evaluated in (("sft", 8, [0, 4, 8]), ("reward", 4, [0, 4])):
        train, evaluation = (records(one_rank.folder / name, k) for k in ("train", "eval"))
        assert [record["step"] for record in train] == [*range(1, steps + 1)]
        assert [record["step"] for record in evaluation] == evaluated
        rates = column(train, "lr/lora_A", "lr/lora_B")
        torch.testing.assert_close(rates[:, 1], 16 * rates[:, 0], rtol=FIGURE, atol=0)
        losses = column(evaluation, "loss")
        assert losses[-1] < losses[0]


def test_every_role_carries_the_same_adapters(one_rank: Run):
    """Seven in each of two layers: none on an output head, a value head or a copy of one."""
    rows = re.findall(r"^(lora_[AB]) .* (\d+)  +([\d,]+)$", one_rank.printed, re.MULTILINE)
    # r = 4: A has 4 x (6 x 32 + 48) numbers a layer, B has 4 x (32 + 16 + 16 + 32 + 48 + 48 + 32).
    assert rows == 8 * [("lora_A", "14", "1,920"), ("lora_B", "14", "1,792")]


def test_the_saved_language_model_has_the_loss_that_was_reported(one_rank: Run, inputs: Path):
    model = load(AutoModelForCausalLM, one_rank.folder / "sft")
    total = count = 0
    with torch.no_grad():
        for ids, prompt in evaluation_ids(inputs, "chosen"):
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total -= sum(logprobs[t - 1, ids[t]].item() for t in range(prompt, len(ids)))
            count += len(ids) - prompt
    reported = records(one_rank.folder / "sft", "eval")[-1]["loss"]
    assert total / count == pytest.approx(reported, abs=LOGITS)


def test_the_saved_reward_model_scores_as_was_reported(one_rank: Run, inputs: Path):
    model = load(AutoModelForSequenceClassification, one_rank.folder / "reward")
    assert model.num_labels == 1
    with torch.no_grad():
        chosen, rejected = (
            torch.tensor([model(torch.tensor([ids])).logits.item() for ids, _ in rows])
            for rows in (evaluation_ids(inputs, "chosen"), evaluation_ids(inputs, "rejected"))
        )
    reported = records(one_rank.folder / "reward", "eval")[-1]
    assert (chosen - rejected).mean().item() == pytest.approx(reported["margin"], abs=LOGITS)
    assert (chosen > rejected).float().mean().item() == pytest.approx(reported["accuracy"])


def evaluation(folder: Path) -> dict:
    """Report of an evaluation, without the flags that repeat it."""
    report = json.loads((folder / "evaluation.json").read_text())
    assert report.pop("settings")
    return report


def test_rw_eval_repeats_an_evaluation_from_the_folder_alone(one_rank: Run):
    """Bit for bit; where the live adapters have been merged, to rounding."""
    folder = one_rank.folder
    assert evaluation(folder / "x") == evaluation(folder / "full")
    live, merged = evaluation(folder / "reward/adapter"), evaluation(folder / "again")
    assert live == evaluation(folder / "reward")
    assert merged["figures"] == pytest.approx(live["figures"], abs=LOGITS)
    assert merged["whole"]["accuracy"] == live["whole"]["accuracy"]


def test_rows_of_a_benchmark_are_all_scored_and_shown_by_subset(one_rank: Run):
    report = evaluation(one_rank.folder / "bench")
    counts = [(part["name"], part["pairs"]) for part in report["subsets"]]
    assert counts == [("long", 7), ("short", 13)] and report["figures"]["pairs"] == 20
    assert re.search(r"^short +13 ", one_rank.printed, re.MULTILINE)


def test_rw_eval_prints_the_figures_of_the_last_evaluation(one_rank: Run):
    line = re.search(r"^loss .* accuracy .*$", one_rank.printed, re.MULTILINE)
    figures = dict(part.rsplit(" ", 1) for part in line.group().split(" | "))
    reported = records(one_rank.folder / "reward", "eval")[-1]
    assert set(figures) == set(reported) - {"kind", "step"}
    for name, text in figures.items():
        # Printed with four digits: off by half of the last, at most 5e-4 of the figure.
        assert float(text) == pytest.approx(reported[name], rel=5e-4), name


def test_prompt_eval_answers_with_both_models(one_rank: Run):
    answers = one_rank.printed.partition("== Human: 1 and 2?")[2]
    labels = re.findall(r"^ *(\w+), (\w+): ", answers, re.MULTILINE)
    assert labels == [(m, k) for m in ("baseline", "finetune") for k in ("greedy", "sampled")]


def test_grpo_with_rewards_that_check(one_rank: Run):
    """7 of 8 rows train, 4 answers each; every part of the reward is logged under its name."""
    train = records(one_rank.folder / "grpo", "train")
    assert [record["answers"] for record in train] == [16, 12]
    names = {"rewards/exact_number", "rewards/digits", "rewards/length"}
    assert all({"reward", "reward_std", "unscored", *names} <= record.keys() for record in train)
    assert all(record["unscored"] == 0.0 and record["actor_updates"] == 1 for record in train)
    assert names - {"rewards/digits"} <= records(one_rank.folder / "grpo", "eval")[0].keys()
    answers = map(json.loads, (one_rank.folder / "grpo/answers.jsonl").read_text().splitlines())
    for answer in answers:
        parts = answer["rewards"]
        digits = sum(map(str.isdigit, answer["answer"])) / 8
        assert (parts["digits"] or 0.0) == digits and answer["reward_function"] is None
        whole = parts["exact_number"] + 0.5 * digits + 0.1 * parts["length"]
        assert answer["reward"] == pytest.approx(whole, abs=NEAR_ONE)
    before, after = (
        load(AutoModelForCausalLM, folder).state_dict()
        for folder in (one_rank.folder.parent / "model", one_rank.folder / "grpo" / "actor")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_ppo_on_one_rank(one_rank: Run):
    assert_on_policy(one_rank.folder / "ppo", iterations=2)  # 13 prompts, 8 at a time
    before = load(AutoModelForCausalLM, one_rank.folder / "sft").state_dict()
    after = load(AutoModelForCausalLM, one_rank.folder / "ppo" / "actor").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj." in name}  # what carries adapters
    load(AutoModelForSequenceClassification, one_rank.folder / "ppo" / "critic")
    assert not (one_rank.folder / "ppo" / "actor_ema").exists()


def test_adapters_lie_beside_merged_models_whose_base_is_whole(one_rank: Run, inputs: Path):
    for name, base in (("sft", inputs / "model"), ("reward", one_rank.folder / "sft")):
        config = json.loads((one_rank.folder / name / "adapter/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
    for role in ("actor", "critic"):  # trained on an adapter
        assert not (one_rank.folder / "ppo" / role / "adapter").exists()
    notes = re.findall(r"^only the merged model will be saved.*$", one_rank.printed, re.MULTILINE)
    assert len(notes) == 2


def test_every_program_runs_on_two_ranks(two_ranks: Run):
    assert [result.code for result in two_ranks.results] == [2, *(4 * [0])]
    for name in ("sft", "sft-bf16", "reward-bf16", "ppo"):
        assert_all_finite(two_ranks.folder / name)


def test_bad_data_ends_both_ranks_with_one_line(two_ranks: Run, inputs: Path):
    """The worker goes on afterwards: no rank was left waiting.

    The other rank, which nothing ends here when the first has, says in the end what it met itself.
    """
    first = two_ranks.results[0]
    assert first.stderr.startswith("error: data_path ./nothing.jsonl: no such file")
    assert len(first.stderr.splitlines()) == 1
    assert first.read == []
    assert two_ranks.printed.count("ended with 2 ") == 2
    other = (inputs / "worker-2" / "stderr.0.1").read_text()
    assert other == first.stderr.replace("error: ", "error: rank 1: ", 1)


def test_step_1_is_the_same_on_one_and_on_two_ranks(one_rank: Run, two_ranks: Run):
    """One rank without ZeRO, two with ZeRO 2, the same global batch: the same path in fp32."""
    one, two = one_rank.folder / "sft", two_ranks.folder / "sft"
    for kind, names in (("train", ("step", "loss", "lr/lora_B")), ("eval", ("step", "loss"))):
        on_two, on_one = (column(records(folder, kind), *names) for folder in (two, one))
        torch.testing.assert_close(on_two, on_one, rtol=0, atol=LOGITS)
    assert_same_weights(one, two, rate=16e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft-packed", "sft-tokens"])
def test_other_batches_are_the_same_on_one_and_on_two_ranks(
    one_rank: Run, two_ranks_again: Run, name: str
):
    """Packs and micro-batches by tokens are dealt; what an optimizer step averages over is one."""
    one, two = one_rank.folder / name, two_ranks_again.folder / name
    for kind, names in (("train", ("step", "loss", "lr/lora_B")), ("eval", ("step", "loss"))):
        on_two, on_one = (column(records(folder, kind), *names) for folder in (two, one))
        torch.testing.assert_close(on_two, on_one, rtol=0, atol=LOGITS)
    losses = column(records(one, "eval"), "loss")
    assert losses[-1] < losses[0]
    # Before training, evaluation by rows is that of the run in rows.
    torch.testing.assert_close(
        losses[0], column(records(one_rank.folder / "sft", "eval"), "loss")[0]
    )


@pytest.mark.parametrize(
    "runs", ["one_rank", pytest.param("two_ranks_again", marks=pytest.mark.slow)]
)
def test_a_stream_trains_until_max_steps(request, one_rank: Run, runs: str):
    folder = request.getfixturevalue(runs).folder / "sft-stream"
    train, evaluation = (records(folder, kind) for kind in ("train", "eval"))
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5, 6]
    losses = column(evaluation, "loss")
    # The evaluation set is the same as without a stream, and the model starts the same.
    expected = column(records(one_rank.folder / "sft", "eval"), "loss")[0]
    torch.testing.assert_close(losses[0], expected, rtol=0, atol=LOGITS)
    assert losses[-1] < losses[0]


def test_max_steps_ends_a_run_in_the_middle_of_an_epoch(one_rank: Run):
    train = records(one_rank.folder / "sft-tokens", "train")
    evaluation = records(one_rank.folder / "sft-tokens", "eval")
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5]
    assert evaluation[-1]["step"] == 5
    assert train[-1]["lr/lora_A"] < 0.2 * train[0]["lr/lora_A"]  # the schedule ends there too


@pytest.mark.slow
def test_a_reward_model_evaluates_the_same_on_one_and_on_two_ranks(
    one_rank: Run, two_ranks_again: Run
):
    """Other batches and ZeRO 3 change nothing: 13 pairs, 4 at a time or 2 x 3 at a time."""
    last = records(one_rank.folder / "reward", "eval")[-1:]
    first = records(two_ranks_again.folder / "reward", "eval")[:1]
    names = ("loss", "accuracy", "margin", "confidence", "mean_score", "score_std")
    torch.testing.assert_close(column(first, *names), column(last, *names), rtol=0, atol=LOGITS)


def test_scores_are_scaled_by_the_figures_of_the_last_evaluation(one_rank: Run):
    """Step 2 saves them with the merged weights and with the adapter; step 3 reads the latter."""
    reward, ppo = one_rank.folder / "reward", one_rank.folder / "ppo"
    last = records(reward, "eval")[-1]
    for folder in (reward, reward / "adapter"):
        saved = json.loads((folder / "reward_statistics.json").read_text())
        assert (saved["mean"], saved["std"]) == (last["mean_score"], last["score_std"])
        assert saved["count"] == 26
    for record in records(ppo, "train"):  # no score comes near the clip
        scaled = (record["reward_model"] - last["mean_score"]) / last["score_std"]
        assert record["reward"] == pytest.approx(scaled, abs=LOGITS)
    assert not list(ppo.rglob("reward_statistics.json"))  # a critic's values are no scores
    scaling = json.loads((ppo / "critic" / "value_scaling.json").read_text())
    assert (scaling["mean"], scaling["std"]) == (last["mean_score"], last["score_std"])


def test_ppo_on_two_ranks_in_bf16(two_ranks: Run):
    folder = two_ranks.folder / "ppo"
    assert_on_policy(folder, iterations=2)  # 13 prompts, 2 x 4 at a time
    names = {"start": "../sft-bf16", "actor": "actor", "average": "actor_ema"}
    loaded = {k: load(AutoModelForCausalLM, folder / name) for k, name in names.items()}
    states = {k: model.state_dict() for k, model in loaded.items()}
    assert {p.dtype for model in loaded.values() for p in model.parameters()} == {torch.bfloat16}
    weight = "model.layers.0.mlp.up_proj.weight"
    moved = (states["actor"][weight] - states["start"][weight]).abs().max()
    lag = (states["average"][weight] - states["start"][weight]).abs().max()
    assert lag < 0.1 * moved  # after two steps of decay 0.992 the average has hardly moved
    load(AutoModelForSequenceClassification, folder / "critic")


@pytest.mark.slow
def test_step_1_under_the_deepspeed_launcher(inputs: Path):
    """It sets ranks and appends --local_rank itself."""
    folder = inputs / "launcher"
    argv = [ROOT / SFT, *sft_fp32(folder, 2)[1:], "--max_train_samples", 10, "--zero_stage", 2]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    launcher += ["--master_port", free_port()]
    done = launch([str(word) for word in [*launcher, *argv, "--deepspeed"]], inputs)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_all_finite(folder / "sft")
    # 10 rows, 2 x 4 at a time, are 2 steps in each of 2 epochs.
    assert [record["step"] for record in records(folder / "sft", "train")] == [1, 2, 3, 4]
    load(AutoModelForCausalLM, folder / "sft")
