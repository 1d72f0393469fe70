"""A saved reward model that a reader scores otherwise is found out when it is saved."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from dschat.data.batches import PairBatch
from dschat.errors import UserError
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.train.pair_report import ScoredPairs
from dschat.train.saved_scores import check_saved_scores
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers import tiny
from tests.helpers.adapters import ALONE, plan, save_base, with_adapter
from tests.helpers.families import save_family
from tests.helpers.scores import scores_alone

LORA = LoraConfig(lora_dim=4, lora_module_name=("attn",))
ROWS = [[5, 9, 7, 8, tiny.EOS], [5, 9, tiny.EOS], [4, 3, 6, tiny.EOS], [4, 3, tiny.EOS]]


def pairs() -> PairBatch:
    ids, mask = tiny.padded(ROWS)
    return PairBatch(ids, mask, torch.ones(2, dtype=torch.bool), mask)


def scored(model) -> ScoredPairs:
    """Two pairs that were scored in training, and the spread of two further ones."""
    scores = scores_alone(model, ROWS).double()
    more = torch.tensor([1.0, -1.0]).double()
    chosen, rejected = torch.cat([scores[:2], more]), torch.cat([scores[2:], -more])
    return ScoredPairs(chosen, rejected, *torch.ones(2, 4).double())


def saved(tmp_path: Path, name: str, save: str = "merged", pad: str = "<pad>"):
    """A folder, and the model that it holds; `save` as --lora_save."""
    tokenizer, out = tiny.byte_tokenizer(), tmp_path / "out"
    tokenizer.pad_token = pad
    maker = save_family if name == "granite" else save_base
    base = maker(tmp_path / "base", name)
    tokenizer.save_pretrained(base)
    model = create_critic_model(str(base), tokenizer, torch.float32, init_head=True)
    model = with_adapter(model, LORA).eval()
    torch.nn.init.normal_(model.v_head.weight)
    save_hf_format(model, tokenizer, out, ALONE, plan(save, str(base), LORA, out))
    return out, model


@pytest.mark.parametrize(
    ("name", "save", "pad"),
    [
        ("llama", "merged", "<pad>"),
        ("gpt2", "merged", "</s>"),
        ("llama", "adapter", "<pad>"),
        ("granite", "merged", "<pad>"),  # trunk and head: this project's reader
    ],
)
def test_a_folder_that_scores_alike_passes_and_one_that_does_not_is_refused(
    tmp_path: Path, name: str, save: str, pad: str
):
    out, model = saved(tmp_path, name, save, pad)
    check_saved_scores(model, out, pairs(), scored(model))
    (file,) = out.glob("*.safetensors")
    state = load_file(file)
    head = next(n for n in state if n.endswith(("score.weight", "v_head.weight")))
    state[head] = -state[head]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="scores held-out pairs otherwise than in training"):
        check_saved_scores(model, out, pairs(), scored(model))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="the saved model is not read"):
        check_saved_scores(model, out, pairs(), scored(model))


def test_a_model_that_the_host_has_no_room_for_is_said(tmp_path: Path, monkeypatch, capsys):
    out, model = saved(tmp_path, "llama")
    few = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: few)
    check_saved_scores(model, out, pairs(), scored(model))
    assert "was not read back" in capsys.readouterr().out
