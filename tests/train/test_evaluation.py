"""Evaluation: the figures of the whole set, in the mode that it found the model in."""

import math

import pytest
import torch
from torch import nn

from dschat.data.batches import PreferenceBatch, SFTBatch
from dschat.errors import UserError
from dschat.models.causal_lm import check_context
from dschat.train.evaluation import evaluate_answers, evaluate_pairs, score_pairs
from tests.helpers.rounding import IN_A_ROW, NEAR_ONE, ROUNDING
from tests.helpers.tiny import byte_tokenizer, padded, save_llama_folder, tiny_llama, token_rows

CPU = torch.device("cpu")


class ScoresById(nn.Module):
    """The value of a position is its token id."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return input_ids.float()


def pair_batch(
    chosen: list[int], rejected: list[int], real: list[bool], numbers: list[int]
) -> PreferenceBatch:
    ids = torch.tensor([[9, score] for score in chosen + rejected])
    mask = torch.ones_like(ids, dtype=torch.bool)
    return PreferenceBatch(ids, mask, torch.tensor(real), mask, torch.tensor(numbers))


def test_pair_figures_by_hand():
    # margins 2, 0, -1 in two batches; a filler pair of margin 50 counts nowhere
    batches = [
        pair_batch([5, 3], [3, 3], [True, True], [2, 0]),
        pair_batch([1, 60], [2, 10], [True, False], [1, 0]),
    ]
    scored = score_pairs(ScoresById(), batches, CPU)
    assert scored.chosen.tolist() == [3, 1, 5]  # in the order of the set, not of the batches
    figures = evaluate_pairs(ScoresById(), batches, CPU)
    margins = [2.0, 0.0, -1.0]
    chances = [1 / (1 + math.exp(-m)) for m in margins]
    sure = [1 / (1 + math.exp(-abs(m))) for m in margins]  # 0.881, 0.5, 0.731: three bins
    # Wilson's interval of 1.5 of 3, z = 1.96: half = z sqrt(1/12 + z^2/36) / (1 + z^2/3)
    half = 1.959964 * math.sqrt(1 / 12 + 1.959964**2 / 36) / (1 + 1.959964**2 / 3)
    expected = {
        "loss": -sum(math.log(p) for p in chances) / 3,
        "accuracy": (1 + 0.5 + 0) / 3,
        "accuracy_low": 0.5 - half,
        "accuracy_high": 0.5 + half,
        "margin": 1 / 3,
        "confidence": sum(sure) / 3,
        "ece": (abs(1 - sure[0]) + abs(0.5 - 0.5) + abs(0 - sure[2])) / 3,
        "mean_score": (5 + 3 + 3 + 3 + 1 + 2) / 6,
        "score_std": (sum((x - 17 / 6) ** 2 for x in (5, 3, 3, 3, 1, 2)) / 6) ** 0.5,
    }
    assert figures == pytest.approx(expected, abs=2 * ROUNDING)


def test_answer_loss_is_weighted_by_tokens_not_by_batches():
    model, rows = tiny_llama(), token_rows(5, seed=1)
    ids, mask = padded(rows)
    loss_mask = mask.clone()
    loss_mask[:, :3] = False
    whole = [SFTBatch(ids, mask, torch.ones(5, dtype=torch.bool), loss_mask)]
    parts = [
        SFTBatch(b.input_ids[s], b.attention_mask[s], b.real[s], b.loss_mask[s])
        for b in whole
        for s in (slice(0, 1), slice(1, 5))
    ]
    one, other = (evaluate_answers(model, batches, CPU) for batches in (whole, parts))
    assert one == pytest.approx(other, rel=NEAR_ONE)
    total = count = 0.0
    for row in rows:
        with torch.no_grad():
            every = model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
        total -= sum(every[t - 1, row[t]].item() for t in range(3, len(row)))
        count += len(row) - 3
    assert one["loss"] == pytest.approx(total / count, rel=IN_A_ROW)
    assert one["perplexity"] == pytest.approx(math.exp(total / count), rel=7 * IN_A_ROW)


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_leaves_the_mode_as_it_was(training):
    """A model that is only evaluated must not come out with its dropout on."""
    model = ScoresById().train(training)
    evaluate_pairs(model, [pair_batch([1], [2], [True], [0])], CPU)
    assert model.training is training
    causal, (ids, mask) = tiny_llama().train(training), padded(token_rows(2, seed=1))
    evaluate_answers(causal, [SFTBatch(ids, mask, torch.ones(2, dtype=torch.bool), mask)], CPU)
    assert causal.training is training


def test_context_is_checked_against_the_models_positions(tmp_path):
    folder = str(save_llama_folder(tmp_path / "model"))
    assert len(byte_tokenizer()) > 64  # the limit is of positions, not of the vocabulary
    check_context(folder, 64, "max_seq_len")
    with pytest.raises(UserError) as error:
        check_context(folder, 65, "max_seq_len")
    message = str(error.value)
    assert message.startswith("max_seq_len: sequences of 65 tokens") and "\n" not in message
    assert "has 64 positions; give at most 64" in message
