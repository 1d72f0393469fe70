"""Runs of the LoRA+ grid on tiny models: what is learned, from where, and how it is measured."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.lora_plus import tasks, training
from benchmarks.lora_plus.pair_tasks import pair_task
from benchmarks.lora_plus.training import Outcome, Run, Task, train_once
from dschat.data.collators import SFTCollator
from tests.helpers.rounding import DIFFERENT, LOGITS, NEAR_ONE
from tests.helpers.steps import preference_rows, write_rows
from tests.helpers.tiny import PAD, padded, save_llama_folder, tiny_llama, token_rows


def test_the_cipher_exchanges_every_word_and_turns_the_answer_round():
    cipher = tasks.cipher_of(seed=1)
    assert set(cipher) == set(cipher.values())
    assert all(word != secret for word, secret in cipher.items())
    row = {"prompt": "What?", "response": " With pleasure! A cow says moo."}
    secret = tasks.encipher(row, cipher)
    assert secret["prompt"] == "What?"
    back = {b: a for a, b in cipher.items()}
    words = [back[word] for word in secret["response"].split()]
    assert words == ["moo", "says", "cow", "A", "pleasure", "With"]


def test_every_row_comes_once_an_epoch_in_the_seeds_order():
    batches = list(training.batch_order(rows=6, batch_size=4, steps=3, seed=1))
    flat = [number for batch in batches for number in batch]
    assert sorted(flat[:6]) == sorted(flat[6:]) == list(range(6))
    assert batches == list(training.batch_order(6, 4, 3, seed=1))
    assert batches != list(training.batch_order(6, 4, 3, seed=2))


@pytest.fixture(scope="module")
def tiny_task() -> Task:
    collator = SFTCollator(PAD)
    rows = [
        {"input_ids": ids, "trained": [2, len(ids)], "prompt_len": 2, "length": len(ids)}
        for ids in token_rows(24, 3)
    ]
    return Task("tiny", tiny_llama(), rows, [collator(rows[:4]), collator(rows[4:6])], collator)


def test_training_starts_from_the_same_model_and_repeats_exactly(tiny_task):
    before = {name: weight.clone() for name, weight in tiny_task.model.state_dict().items()}
    start_loss = training.evaluate(tiny_task, tiny_task.model)[0]
    run = Run("A", 2.0**-8, 2.0**-4, seed=1, steps=10, eval_every=4)
    outcome = train_once(tiny_task, run, rank=4, batch_size=8)
    assert [step for step, _ in outcome.curve] == [4, 8, 10]
    assert outcome.loss == outcome.curve[-1][1] < start_loss
    assert train_once(tiny_task, run, rank=4, batch_size=8) == outcome
    losses = {outcome.loss}
    for other in (replace(run, seed=2), replace(run, init="B"), replace(run, eta_B=2.0**-5)):
        losses.add(train_once(tiny_task, other, rank=4, batch_size=8).loss)
    losses.add(train_once(tiny_task, replace(run, init="full", eta_B=run.eta_A), 4, 8).loss)
    assert len(losses) == 5
    after = tiny_task.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_doubling_alpha_is_doubling_lambda_where_b_starts_at_zero(tiny_task):
    # s B A with s = 2 and B at eta: Adam ignores the doubled gradient of B, so s B moves as B does
    # at 2 eta; A sees the same gradient. Clipping is felt, but not where the norm stays below 1.
    small = replace(tiny_task, model=tiny_llama(initializer_range=0.02))
    doubled = Run("A", 2.0**-9, 2.0**-9, seed=1, steps=4, alpha=2.0)
    ratio = Run("A", 2.0**-9, 2.0**-8, seed=1, steps=4)
    plain = Run("A", 2.0**-9, 2.0**-9, seed=1, steps=4)
    losses = [train_once(small, run, 4, 8).loss for run in (doubled, ratio, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=NEAR_ONE)
    assert abs(losses[0] - losses[2]) > DIFFERENT


def test_a_run_that_leaves_the_numbers_is_diverged(tiny_task):
    steps = iter((1.0, 1.0, math.nan))

    def leaving(model, batch):
        found = training.answer_losses(model, batch)
        return replace(found, total=found.total * next(steps))

    run = Run("A", 2.0**-8, 2.0**-4, seed=1, steps=8)
    assert train_once(replace(tiny_task, losses=leaving), run, 4, 8) == Outcome(None, ())


def test_evaluation_is_the_mean_over_answer_tokens_and_blind_to_padding(tiny_task):
    rows = [(row["input_ids"], row["prompt_len"]) for row in tiny_task.train[:6]]
    total = count = 0.0
    for ids, start_at in rows:  # one row at a time, without any padding
        x, _ = padded([ids])
        with torch.no_grad():
            logprobs = tiny_task.model(x).logits[0].log_softmax(-1)
        total -= sum(logprobs[t - 1, ids[t]].item() for t in range(start_at, len(ids)))
        count += len(ids) - start_at
    measured = training.evaluate(tiny_task, tiny_task.model)[0]
    assert measured == pytest.approx(total / count, rel=LOGITS)


def test_the_embedded_task_is_pretrained_once(tmp_path, monkeypatch):
    for name, value in {"PRETRAIN_STEPS": 2, "TRAIN_ROWS": 64, "TEST_ROWS": 8}.items():
        monkeypatch.setattr(tasks, name, value)
    task = tasks.embedded_task(tmp_path, max_seq_len=64)
    assert len(task.train) == 64 and sum(len(batch.real) for batch in task.evaluation) == 8
    monkeypatch.setattr(tasks, "fit", None)  # a second pretraining would fail
    again = tasks.embedded_task(tmp_path, max_seq_len=64)
    pairs = zip(task.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_run_of_all_weights_is_plain_adamw_on_the_mean_answer_loss(tiny_task, monkeypatch):
    # Norms here are 1.08 to 1.25: clipped at every step, a sum could not be told from a mean.
    limit = 1.15
    monkeypatch.setattr(training, "CLIPPING", limit)
    small = replace(tiny_task, model=tiny_llama(initializer_range=0.02))
    steps, rate = 4, 2.0**-9
    run = Run("full", rate, rate, seed=5, steps=steps)
    model = copy.deepcopy(small.model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step, numbers in enumerate(training.batch_order(24, 8, steps, seed=5)):
        # one step of warm-up from 0, then cosine over the three that are left
        share = 0.5 * (1 + math.cos(math.pi * (step - 1) / 3)) if step else 0.0
        optimizer.param_groups[0]["lr"] = rate * share
        losses = []
        for row in (small.train[number] for number in numbers):
            ids = torch.tensor(row["input_ids"])
            logits, start_at = model(ids[None]).logits[0], row["prompt_len"]
            losses.append(
                F.cross_entropy(logits[start_at - 1 : -1], ids[start_at:], reduction="none")
            )
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
    expected = training.evaluate(small, model)[0]
    assert train_once(small, run, rank=4, batch_size=8).loss == pytest.approx(expected, abs=LOGITS)


@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_pairs_are_learnt_from_a_model_that_stays(tmp_path, name):
    """DPO starts at log 2 with every pair tied: its reference is the model itself."""
    folder = save_llama_folder(tmp_path / "model", max_position_embeddings=128)
    rows = write_rows(tmp_path / "rows.jsonl", preference_rows(80, seed=0))
    task = pair_task(name, str(folder), str(rows), 64, tmp_path)
    rows = [row["number"] for row in task.train] + task.evaluation[0].numbers.tolist()
    assert rows == list(range(len(rows))) and len(task.evaluation) == 1
    before, accuracy = training.evaluate(task, task.model)
    if name == "dpo":
        assert (before, accuracy) == (pytest.approx(math.log(2), abs=LOGITS), 0.5)
    outcome = train_once(task, Run("A", 2.0**-8, 2.0**-4, seed=1, steps=12), 4, 8)
    assert outcome.loss < before - 0.1 and outcome.accuracy > 0.7
    assert training.evaluate(task, task.model) == (before, accuracy)
