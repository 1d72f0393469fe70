"""Right-padded rows without a mask: the same losses, scores and gradients; who keeps the mask."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dschat.data.collators import PairCollator, SFTCollator
from dschat.models import right_padding
from dschat.models.logprobs import target_logprobs
from dschat.models.right_padding import needed_mask
from dschat.train.evaluation import answer_loss, pair_scores
from tests.helpers import tiny
from tests.helpers.rounding import GRADIENTS, IN_A_ROW, LOGITS

SHAPE = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    **tiny.SPECIAL,
}
LLAMA_LIKE = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}


def of_family(family: str, **settings: object) -> nn.Module:
    """A causal LM of this type with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))


CAUSAL: dict[str, Callable[[], nn.Module]] = tiny.ARCHITECTURES | {
    "ALiBi": lambda: of_family("bloom", **SHAPE, n_head=4, n_layer=2),
    "sliding window": lambda: of_family("mistral", **LLAMA_LIKE, sliding_window=4),
    "two kinds of layers": lambda: of_family(
        "gemma3_text",
        **LLAMA_LIKE,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "recurrent": lambda: of_family("mamba", **SHAPE, state_size=4),
    "experts": lambda: tiny.tiny_moe("qwen3_moe"),
}


def masked() -> object:
    """Have every right-padded batch masked, as for a model that needs it."""
    return patch.object(right_padding, "_is_causal", lambda model, device: False)


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def sft_batch():
    rows = tiny.token_rows(4, seed=3)
    return SFTCollator(tiny.PAD)(
        [{"input_ids": ids, "trained": [2, len(ids)], "length": len(ids)} for ids in rows]
    )


def pair_batch():
    rows = tiny.token_rows(6, seed=4)
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return PairCollator(tiny.PAD)(
        [{"chosen_ids": a, "rejected_ids": b, "prompt_len": 1} for a, b in pairs]
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_losses_and_gradients_are_the_masked_ones(name, capsys):
    batch = sft_batch()
    with masked():
        model = CAUSAL[name]()
        expected = answer_loss(model, batch)
        by_mask = gradients(model, expected)
    model = CAUSAL[name]()
    capsys.readouterr()
    calls: list[dict] = []
    trunk = model.get_decoder()
    trunk.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    found = answer_loss(model, batch)
    assert (
        calls[-1].get("attention_mask") is None and "keep their mask" not in capsys.readouterr().out
    )
    torch.testing.assert_close(found, expected, rtol=IN_A_ROW, atol=0)
    for one, other in zip(gradients(model, found), by_mask, strict=True):
        torch.testing.assert_close(one, other, rtol=GRADIENTS, atol=LOGITS)


def test_scores_of_pairs_and_log_probabilities_are_the_masked_ones():
    pairs, answers = pair_batch(), sft_batch()
    with masked():
        expected = pair_scores(tiny.reward_model(), pairs)
        model = tiny.tiny_llama()
        before = target_logprobs(
            model, answers.input_ids, answers.attention_mask, answers.loss_mask
        )
    critic = tiny.reward_model()
    torch.testing.assert_close(pair_scores(critic, pairs), expected, rtol=0, atol=LOGITS)
    assert needed_mask(critic, pairs.input_ids, pairs.attention_mask) is None
    model = tiny.tiny_llama()
    after = target_logprobs(model, answers.input_ids, answers.attention_mask, answers.loss_mask)
    torch.testing.assert_close(after, before, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_model_that_sees_what_follows_keeps_its_mask_and_says_so_once(family, capsys):
    model = of_family(family, **SHAPE, intermediate_size=48)
    ids, mask = tiny.padded(tiny.token_rows(3, seed=1))
    assert needed_mask(model, ids, mask) is mask and needed_mask(model, ids, mask) is mask
    assert capsys.readouterr().out.count("right-padded batches keep their mask") == 1


def test_a_model_that_finds_positions_by_the_padding_token_keeps_its_mask():
    """Real tokens that are the padding's too shift what follows, unless positions are given."""

    class ByPadding(nn.Module):
        config = tiny.tiny_llama().config

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            if position_ids is None:
                position_ids = (input_ids != self.config.pad_token_id).cumsum(-1)
            return position_ids.float()

    ids, mask = tiny.padded(tiny.token_rows(3, seed=1))
    assert needed_mask(ByPadding(), ids, mask) is mask


def test_the_proof_runs_once_and_leaves_mode_and_random_numbers_as_they_were():
    model = tiny.tiny_llama().train()
    ids, mask = tiny.padded(tiny.token_rows(3, seed=1))
    state = torch.get_rng_state()
    with patch.object(right_padding, "outputs", wraps=right_padding.outputs) as outputs:
        assert needed_mask(model, ids, mask) is needed_mask(model, ids, mask) is None
    assert outputs.call_count == 2 and model.training
    assert torch.equal(torch.get_rng_state(), state)
