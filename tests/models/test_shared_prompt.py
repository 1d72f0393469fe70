"""A pair in one row: its loss and gradients are those of its answers in rows of their own."""

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomModel, MistralConfig

from dschat.data.batches import SharedPromptBatch
from dschat.data.collators import RewardCollator
from dschat.errors import UserError
from dschat.functional.losses import pairwise_loss
from dschat.models import shared_prompt
from dschat.models.reward_model import RewardModel
from dschat.models.shared_prompt_proof import check_shared_prompts, prove_shared_prompts
from dschat.train.evaluation import pair_count, pair_scores
from tests.helpers.rounding import GRADIENTS, LOGITS
from tests.helpers.tiny import PAD, VOCABULARY, save_llama_folder, tiny_gpt2, tiny_llama, tiny_opt

CPU = torch.device("cpu")
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt}


def reward_model(name: str, attention: str = "sdpa") -> RewardModel:
    torch.manual_seed(0)
    trunk = MODELS[name]().base_model
    trunk.set_attn_implementation(attention)
    return RewardModel(trunk).eval()


def rows() -> list[dict]:
    draw, made = torch.Generator().manual_seed(0), []
    for prompt, chosen, rejected in ((9, 3, 2), (12, 1, 4), (7, 2, 2)):
        p, c, r = (
            torch.randint(3, 60, (n,), generator=draw).tolist() for n in (prompt, chosen, rejected)
        )
        length = prompt + max(chosen, rejected)
        made.append(
            {"chosen_ids": p + c, "rejected_ids": p + r, "prompt_len": prompt, "length": length}
        )
    made[-1]["real"] = False
    return made


def loss_and_gradients(model: nn.Module, shares: bool) -> list[torch.Tensor]:
    batch = RewardCollator(PAD, share_prompts=shares)(rows())
    assert isinstance(batch, SharedPromptBatch) == shares and pair_count(batch) == 2
    model.zero_grad()
    loss = pairwise_loss(*pair_scores(model, batch), batch.real, batch.margin)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_rows_of_their_own(name, attention):
    model = reward_model(name, attention)
    apart, together = (
        [part.clone() for part in loss_and_gradients(model, shares)] for shares in (False, True)
    )
    assert len(apart) == len(together) > 10
    for found, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(found, expected, rtol=GRADIENTS, atol=LOGITS)


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_proved_apart(name):
    prove_shared_prompts(reward_model(name).train(), CPU)


def test_an_answer_that_sees_the_other_is_refused(monkeypatch):
    def causal(segments: torch.Tensor) -> torch.Tensor:
        length = segments.shape[-1]
        return torch.ones(1, 1, length, length, dtype=torch.bool).tril()

    monkeypatch.setattr(shared_prompt, "tree_mask", causal)
    with pytest.raises(UserError, match="another answer to the prompt stands in the same row"):
        prove_shared_prompts(reward_model("llama"), CPU)


def test_positions_that_run_on_are_refused(monkeypatch):
    plain = shared_prompt.masked_inputs

    def running_on(model, input_ids, mask, position_ids):
        counted = torch.arange(input_ids.shape[1])[None]
        return plain(model, input_ids, mask, counted)

    monkeypatch.setattr(shared_prompt, "masked_inputs", running_on)
    with pytest.raises(UserError, match="share_prompts: this model's values"):
        prove_shared_prompts(reward_model("llama"), CPU)


def test_what_the_config_forbids_is_refused(tmp_path):
    check_shared_prompts(str(save_llama_folder(tmp_path / "llama")), 32)
    bloom = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    BloomModel(bloom).save_pretrained(tmp_path / "bloom")
    MistralConfig(vocab_size=VOCABULARY, sliding_window=16).save_pretrained(tmp_path / "mistral")
    for name, reason in (("bloom", "takes no position_ids"), ("mistral", "sliding_window 16")):
        with pytest.raises(UserError, match=f"share_prompts: model .*{reason}"):
            check_shared_prompts(str(tmp_path / name), 32)
