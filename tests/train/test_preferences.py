"""A preference loss on batches: references, figures, micro-batches, what is kept on disk."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
import torch
from torch import nn

from dschat.data.batches import PreferenceBatch
from dschat.data.batching import Loader, build_loader
from dschat.data.collators import PreferenceCollator
from dschat.data.mismatched import Mismatched
from dschat.functional.preferences import PREFERENCE_LOSSES
from dschat.train.means import Means
from dschat.train.pair_logprobs import pair_logprobs
from dschat.train.preference_config import PreferenceConfig
from dschat.train.preferences import FallWatch, Objective, evaluate_preferences
from dschat.train.reference import AdaptersOff, Precomputed, Reference, precompute
from dschat.utils.module.lora import adapters_disabled
from tests.helpers import tiny
from tests.helpers.adapters import ALONE
from tests.helpers.rounding import DIFFERENT, GRADIENTS, LOGITS, LOGPROBS, NEAR_ONE, ROUNDING
from tests.helpers.tiers import tiers

CPU = torch.device("cpu")
LONGEST = 16


def pairs(count: int) -> datasets.Dataset:
    """Rows of phase 2: a prompt of 2 to 4 tokens, and two answers to it."""
    prompts, chosen, rejected = (tiny.token_rows(count, seed, 9) for seed in (1, 2, 3))
    rows = []
    for i, (prompt, *answers) in enumerate(zip(prompts, chosen, rejected, strict=True)):
        start = prompt[: 2 + i % 3]
        good, bad = ([*start, *answer] for answer in answers)
        length = max(len(good), len(bad))
        rows.append(
            {"chosen_ids": good, "rejected_ids": bad, "prompt_len": len(start), "length": length}
        )
    return datasets.Dataset.from_list(rows)


ROWS = pairs(7)


def loader(size: int, kl: bool = False, rows: datasets.Dataset = ROWS, first: int = 0) -> Loader:
    mismatched = Mismatched(rows, LONGEST, tiny.BOS) if kl else None
    collator = PreferenceCollator(tiny.PAD, first, mismatched)
    loader = build_loader(rows, collator, size, rank=0, world_size=1, seed=0, shuffle=True)
    assert isinstance(loader, Loader)
    return loader


def objective(name: str, reference: Reference) -> Objective:
    loss = PREFERENCE_LOSSES[name]
    return Objective(loss, loss.defaults, reference)


def table(model: nn.Module, folder: Path, columns: int = 2) -> Precomputed:
    kept = folder, "rows"
    return precompute(model, [loader(3, columns == 3)], ALONE, kept, columns)


def gradients(
    model: nn.Module, one: Objective, batches: Sequence[PreferenceBatch]
) -> tuple[float, torch.Tensor]:
    """Summed loss of an accumulation group, and all gradients in one row."""
    model.zero_grad()
    distance, total = one.distance(model, batches), 0.0
    for batch in batches:
        loss, _ = one(model, batch, distance)
        loss.backward()
        total += loss.item()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    return total, torch.cat([grad.flatten() for grad in trained])


def test_an_answers_log_probability_is_that_of_its_tokens_with_the_end():
    model, batch = tiny.tiny_llama(), next(iter(loader(7)))
    found = torch.stack(pair_logprobs(model, batch))
    assert found.dtype == torch.float64
    for i, number in enumerate(batch.numbers.tolist()):
        row = ROWS[number]
        for side, name in enumerate(("chosen_ids", "rejected_ids")):
            ids = torch.tensor([row[name]])
            logprobs = model(ids).logits[0].log_softmax(-1)
            positions = range(row["prompt_len"], ids.shape[1])
            assert ids[0, -1] == tiny.EOS
            expected = sum(logprobs[t - 1, ids[0, t]].item() for t in positions)
            assert found[side, i].item() == pytest.approx(expected, abs=LOGPROBS)


@pytest.mark.parametrize("name", tiers(PREFERENCE_LOSSES, {"sigmoid", "kto"}))
def test_micro_batches_change_neither_loss_nor_gradient(name: str):
    """KTO's distance is that of the accumulation group, however it is divided."""
    model, needs_kl = tiny.adapted(tiny.tiny_llama()), PREFERENCE_LOSSES[name].needs_kl
    one = objective(name, AdaptersOff())
    loss, whole = gradients(model, one, list(loader(7, needs_kl)))
    other_loss, parts = gradients(model, one, list(loader(2, needs_kl)))
    assert other_loss == pytest.approx(loss, abs=LOGITS)
    torch.testing.assert_close(parts, whole, atol=LOGITS, rtol=GRADIENTS)
    assert whole.abs().max() > DIFFERENT


@pytest.mark.parametrize("name", ["sigmoid", "kto"])
def test_what_was_computed_beforehand_is_the_model_with_its_adapters_off(name: str, tmp_path):
    model, needs_kl = tiny.adapted(tiny.tiny_llama()), PREFERENCE_LOSSES[name].needs_kl
    kept = table(model, tmp_path, 3 if needs_kl else 2)
    for size in (7, 2):
        for batch in loader(size, needs_kl):
            off = AdaptersOff()
            expected, found = off.pairs(model, batch), kept.pairs(model, batch)
            torch.testing.assert_close(
                torch.stack(found), torch.stack(expected), atol=LOGPROBS, rtol=0
            )
            if needs_kl:
                other = off.mismatched(model, batch)
                torch.testing.assert_close(
                    kept.mismatched(model, batch), other, atol=LOGPROBS, rtol=0
                )
    with adapters_disabled(model):
        plain = torch.stack(pair_logprobs(model, batch))
    torch.testing.assert_close(torch.stack(expected), plain)
    assert (torch.stack(pair_logprobs(model, batch)) - plain).abs().min() > DIFFERENT
    assert not expected[0].requires_grad and not model.training


def test_the_reference_is_scored_without_dropout_and_training_goes_on():
    model = tiny.adapted(tiny.tiny_llama(attention_dropout=0.5)).train()
    batch = next(iter(loader(3)))
    one, other = (torch.stack(AdaptersOff().pairs(model, batch)) for _ in range(2))
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert model.training


class LikeAnEngine(nn.Module):
    """Passes modes on and itself says that it trains, always, as DeepSpeed's engine does."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def train(self, mode: bool = True) -> nn.Module:
        self.module.train(mode)
        return self

    def forward(self, **inputs: object) -> object:
        return self.module(**inputs)


def test_an_evaluation_stays_without_dropout_after_the_references_pass():
    model = LikeAnEngine(tiny.adapted(tiny.tiny_llama(attention_dropout=0.5)).train())
    one = objective("kto", AdaptersOff())
    figures = [evaluate_preferences(model, loader(3, True), CPU, one) for _ in range(2)]
    assert figures[0] == figures[1] and model.module.training


def test_what_is_kept_is_read_again_and_belongs_to_one_model(tmp_path, capsys):
    first = table(tiny.tiny_llama(), tmp_path)
    assert "computed once in" in capsys.readouterr().out
    again = table(tiny.tiny_llama(), tmp_path)
    assert "read from" in capsys.readouterr().out
    assert again.key == first.key and torch.equal(again.table, first.table)
    # Adapters are not part of what training starts from; every weight of the base is.
    adapted = table(tiny.adapted(tiny.tiny_llama()), tmp_path)
    assert adapted.key == first.key and "read from" in capsys.readouterr().out
    other = tiny.tiny_llama()
    with torch.no_grad():
        other.lm_head.weight[5, 3] += 1e-3
    keys = {table(m, tmp_path).key for m in (other, tiny.tiny_llama().bfloat16())}
    assert len(keys | {first.key}) == 3
    assert "read from" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_file_is_computed_anew(tmp_path, capsys, damage):
    first = table(tiny.tiny_llama(), tmp_path)
    (file,) = tmp_path.rglob("logprobs.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content if damage == "flipped" else content[:-8])
    again = table(tiny.tiny_llama(), tmp_path)
    out = capsys.readouterr().out
    assert "is damaged; it is made again" in out and out.count("computed once") == 2
    assert torch.equal(again.table, first.table)
    table(tiny.tiny_llama(), tmp_path)
    assert "read from" in capsys.readouterr().out


def test_a_resumed_run_compares_with_what_it_began_with(tmp_path):
    kept = table(tiny.tiny_llama(), tmp_path)
    kept.load_state_dict(kept.state_dict())
    with pytest.raises(Exception, match="another model than the one that the run began with"):
        kept.load_state_dict({"key": "0"})


def test_the_rows_of_both_sets_are_numbered_apart(tmp_path):
    model, more = tiny.tiny_llama(), pairs(9).select(range(7, 9))
    loaders = [loader(3), loader(3, rows=more, first=7)]
    kept = precompute(model, loaders, ALONE, (tmp_path, "rows"), 2)
    assert kept.table.shape == (9, 2)
    (batch,) = loaders[1]
    found = torch.stack(kept.pairs(model, batch))
    torch.testing.assert_close(
        found, torch.stack(pair_logprobs(model, batch)), atol=LOGPROBS, rtol=0
    )


def test_figures_do_not_depend_on_batches_and_fillers_count_nowhere():
    model = tiny.adapted(tiny.tiny_llama())
    one = objective("kto", AdaptersOff())
    expected = evaluate_preferences(model, loader(7, True), CPU, one)
    batches = list(loader(2, True))
    filler = PreferenceCollator(tiny.PAD, 0, Mismatched(ROWS, LONGEST, tiny.BOS))(
        [{**ROWS[4], "number": 4, "real": False}]
    )
    found = evaluate_preferences(model, [*batches, filler], CPU, one)
    assert list(found) == list(expected) and list(found)[:3] == ["loss", "accuracy", "margin"]
    assert found == pytest.approx(expected, abs=LOGITS)
    assert found["margin"] == pytest.approx(found["reward_chosen"] - found["reward_rejected"])
    chosen = sum(len(row["chosen_ids"]) - row["prompt_len"] for row in ROWS)
    per_token = found["logprob_chosen"] * len(ROWS) / chosen
    assert found["logprob_per_token_chosen"] == pytest.approx(per_token)


def test_at_the_start_nothing_has_moved():
    model = tiny.tiny_llama()
    figures = evaluate_preferences(model, loader(3), CPU, objective("sigmoid", AdaptersOff()))
    assert figures["loss"] == pytest.approx(0.6931472, abs=NEAR_ONE)
    expected = {"accuracy": 0.5, "margin": 0.0, "drift_chosen": 0.0, "drift_rejected": 0.0}
    assert {name: figures[name] for name in expected} == expected


def test_an_answer_to_another_prompt():
    make = Mismatched(ROWS, LONGEST, tiny.BOS)
    for number in range(7):
        other = ROWS[(number + 1) % 7]
        side = "chosen_ids" if (number + 1) % 7 % 2 == 0 else "rejected_ids"
        prompt = ROWS[number]["chosen_ids"][: ROWS[number]["prompt_len"]]
        made = make({**ROWS[number], "number": number, "real": True})
        assert made["input_ids"] == prompt + other[side][other["prompt_len"] :]
        assert made["trained"] == [len(prompt), made["length"]] and made["real"]
    short = Mismatched(ROWS, 6, tiny.BOS)({**ROWS[0], "number": 0, "real": True})
    assert short["length"] == 6 and short["input_ids"][-1] == tiny.EOS


@pytest.mark.slow
def test_answers_of_4096_tokens_in_bf16_are_summed_exactly():
    """The losses of such sums: tests/functional/test_preferences.py."""
    shape = {"max_position_embeddings": 4200, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = tiny.adapted(tiny.tiny_llama(**shape, num_key_value_heads=1)).to(torch.bfloat16)
    ids = torch.randint(3, 200, (2, 4100), generator=torch.Generator().manual_seed(0))
    row = {"chosen_ids": ids[0].tolist(), "rejected_ids": ids[1].tolist(), "prompt_len": 4}
    batch = PreferenceCollator(tiny.PAD)([{**row, "length": 4100, "number": 0, "real": True}])
    loss, gradient = gradients(model, objective("sigmoid", AdaptersOff()), [batch])
    assert torch.isfinite(torch.tensor(loss)) and torch.isfinite(gradient).all()
    # A sum in bf16 would be off by up to 2^-9 of thousands of nats, more than any margin.
    with torch.no_grad():
        logits = model(ids[:1]).logits[0, 3:-1].double().log_softmax(-1)
        found = pair_logprobs(model, batch)[0].item()
    plain = logits.gather(-1, ids[0, 4:, None]).sum().item()
    # 4,096 terms, rounded like a random walk; their sum in pairs is rounded 12 times.
    apart = 4096**0.5 * LOGPROBS + 12 * ROUNDING * abs(plain)
    assert found == pytest.approx(plain, abs=apart) and plain < -5000


def fallen(chosen: float, rejected: float, **more: float) -> dict[str, float]:
    return {"logprob_per_token_chosen": chosen, "logprob_per_token_rejected": rejected, **more}


def test_the_fall_of_both_sides_is_told_once():
    watch = FallWatch(PREFERENCE_LOSSES["sigmoid"])
    figures = [
        fallen(-2.0, -2.1, drift_chosen=0.0, drift_rejected=0.0),
        fallen(-1.9, -2.6, drift_chosen=-0.1, drift_rejected=0.5),  # as it should be
        fallen(-2.6, -2.8, drift_chosen=0.6, drift_rejected=0.7),
    ]
    lines = [watch.advice(step, each) for step, each in enumerate(figures)]
    assert lines[:2] == [None, None]
    assert "the chosen by 0.60 nats a token, the rejected by 0.70" in lines[2]
    resumed = FallWatch(PREFERENCE_LOSSES["sigmoid"])
    resumed.load_state_dict(watch.state_dict())
    assert resumed.advice(9, figures[2]) is None


def test_without_a_reference_it_is_a_fall_from_the_start():
    watch = FallWatch(PREFERENCE_LOSSES["simpo"])
    assert watch.advice(0, fallen(-2.0, -2.5)) is None
    resumed = FallWatch(PREFERENCE_LOSSES["simpo"])
    resumed.load_state_dict(watch.state_dict())
    assert "by 0.75 nats a token, the rejected by 1.00" in resumed.advice(10, fallen(-2.75, -3.5))


@pytest.mark.parametrize(
    ("name", "remedies"),
    [
        ("sigmoid", "a lower learning rate, a larger beta, or loss_type apo_zero, which raises"),
        ("apo_zero", "give a lower learning rate, or a larger beta"),
        ("simpo", "give a lower learning rate, or loss_type apo_zero"),  # nothing holds it
        ("orpo", "a lower learning rate, a smaller beta, or loss_type apo_zero"),
    ],
)
def test_remedies_are_those_of_the_loss(name: str, remedies: str):
    watch = FallWatch(PREFERENCE_LOSSES[name])
    watch.advice(0, fallen(-2.0, -2.0))
    assert remedies in watch.advice(1, fallen(-3.0, -3.0))


def test_means_of_differing_terms():
    total = Means()
    total.add(Means({"a": 1.0, "b": 6.0}, {"a": 2.0, "b": 3.0}))
    total.add(Means({"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 4.0}))
    assert total.over_ranks().values() == {"a": 1.0, "b": 1.0}


def test_coefficients_are_the_ones_given_or_the_losss_own():
    assert PreferenceConfig().coefficients == {"beta": 0.1, "label_smoothing": 0.0}
    simpo = PreferenceConfig(loss_type="simpo", simpo_gamma=0.5, label_smoothing=0.1)
    assert simpo.coefficients == {"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1}
    assert PreferenceConfig(loss_type="robust").coefficients["label_smoothing"] == 0.1
    names = {name for loss in PREFERENCE_LOSSES.values() for name in loss.defaults}
    assert all(hasattr(PreferenceConfig(), name) for name in names)
