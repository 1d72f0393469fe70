"""One text, one score: before saving, loaded, merged, by rw_eval, in transformers, however padded.

Each text alone and without padding says what is right. What the test of ranks adds is in
`tests/train/test_scores_ranks.py`.
"""

from __future__ import annotations

import io
import json
import runpy
from pathlib import Path

import pytest
import torch

from dschat.merge import merge
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers import tiny
from tests.helpers.adapters import ALONE, plan, with_adapter
from tests.helpers.families import CLASSIFIED, save_family
from tests.helpers.scores import (
    TEXTS,
    all_ways,
    assert_scores,
    classifier_scores,
    noted_scores,
    scores_alone,
)
from tests.helpers.steps import REWARD_EVALUATION, ROOT
from tests.helpers.tiers import tiers

LORA = LoraConfig(lora_dim=4)
FAMILIES = [*CLASSIFIED, "granite"]


@pytest.mark.parametrize("name", tiers(FAMILIES, {"bloom", "gemma3", "gpt2", "granite"}))
def test_scores_of_a_family_agree(tmp_path: Path, name: str, monkeypatch, capsys):
    """In memory, from the merged folder, the adapter, its merge; by rw_eval; in transformers."""
    tokenizer, out, merged = tiny.byte_tokenizer(), tmp_path / "out", tmp_path / "merged"
    base = save_family(tmp_path / "base", name)
    model = create_critic_model(base, tokenizer, torch.float32, init_head=True)
    model = with_adapter(model, LORA)
    expected = scores_alone(model)
    assert expected.std() > 0.3  # lively: what is wrong shows
    save_hf_format(model, tokenizer, out, ALONE, plan("both", base, LORA, out))
    merge(str(out / "adapter"), str(merged))
    folders = (out, out / "adapter", merged)
    loaded = [create_critic_model(str(f), tokenizer, torch.float32).eval() for f in folders]
    for one in (model, *loaded):
        assert_scores(all_ways(one), expected)
    for folder in (out, merged, *([out / "adapter"] if name in CLASSIFIED else [])):
        assert_scores(noted_scores(folder, TEXTS), expected)
        assert_scores(torch.cat([noted_scores(folder, [text]) for text in TEXTS]), expected)
    if name in CLASSIFIED:
        for folder in (out, merged):
            assert_scores(classifier_scores(folder), expected)
    argv = ["rw_eval.py", "--model_name_or_path", str(out), "--stdin", "--dtype", "fp32"]
    monkeypatch.setattr("sys.argv", [*argv, "--max_seq_len", "64"])
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{text}\n" for text in TEXTS)))
    capsys.readouterr()
    runpy.run_path(str(ROOT / REWARD_EVALUATION))["main"]()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert_scores(torch.tensor([line["score"] for line in lines]), expected)
