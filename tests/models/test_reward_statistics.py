"""Mean and spread of a reward model's scores: written, read, and what step 3 makes of them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dschat import merge
from dschat.errors import UserError
from dschat.models.reward_model import create_critic_model
from dschat.models.reward_statistics import (
    FILE,
    RewardStatistics,
    read_evaluation,
    read_statistics,
    read_value_scaling,
    reward_scaling,
)
from dschat.models.save import save_hf_format
from dschat.train.evaluation import scores_summary
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers.adapters import ALONE, plan, save_base, with_adapter
from tests.helpers.tiny import byte_tokenizer

LORA = LoraConfig(lora_dim=4, lora_alpha=6.0)
FILES = {"evaluation.json": b'{"settings": {"seed": 1}}'}
SAVED = RewardStatistics(mean=-1.5, std=0.25, count=26, data="rows")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `base`; a reward model on it as `merged` with its `merged/adapter`, and as `adapter`."""
    folder, tokenizer = tmp_path_factory.mktemp("made"), byte_tokenizer()
    base = save_base(folder / "base", "llama")
    reward = with_adapter(create_critic_model(base, tokenizer, torch.float32, init_head=True), LORA)
    for name, mode in (("merged", "both"), ("adapter", "adapter")):
        saving = plan(mode, base, LORA, folder / name)
        save_hf_format(reward, tokenizer, folder / name, ALONE, saving, SAVED, FILES)
    return folder


def test_they_are_kept_in_every_form(made, tmp_path):
    for name in ("merged", "merged/adapter", "adapter"):
        assert read_statistics(str(made / name)) == SAVED
        assert (made / name / "evaluation.json").read_bytes() == FILES["evaluation.json"]
    merge.main([str(made / "adapter"), str(tmp_path / "out")])
    assert read_evaluation(str(tmp_path / "out")) == {"settings": {"seed": 1}}
    assert read_statistics(str(tmp_path / "out")) == SAVED
    assert read_statistics(str(made / "base")) is None
    AutoModelForSequenceClassification.from_pretrained(made / "merged", local_files_only=True)


def test_a_newer_model_without_them_leaves_none_behind(made, tmp_path):
    tokenizer = byte_tokenizer()
    model = create_critic_model(str(made / "merged"), tokenizer, torch.float32)
    save_hf_format(model, tokenizer, tmp_path / "out", ALONE, statistics=SAVED)
    assert read_statistics(str(tmp_path / "out")) == SAVED
    save_hf_format(model, tokenizer, tmp_path / "out", ALONE)
    assert read_statistics(str(tmp_path / "out")) is None


def test_a_critic_keeps_what_its_values_were_scaled_by(made, tmp_path):
    tokenizer, base, own = byte_tokenizer(), str(made / "base"), RewardStatistics(1.0, 3.0, 4, "x")
    critic = with_adapter(create_critic_model(base, tokenizer, torch.float32, init_head=True), LORA)
    critic.value_scaling = own
    saving = plan("both", base, LORA, tmp_path / "out")
    save_hf_format(critic, tokenizer, tmp_path / "out", ALONE, saving)
    merge.main([str(tmp_path / "out/adapter"), str(tmp_path / "merged")])
    for name in ("out", "out/adapter", "merged"):
        assert read_value_scaling(str(tmp_path / name)) == own
        assert read_statistics(str(tmp_path / name)) is None  # values are no scores
    assert read_value_scaling(str(made / "merged")) == SAVED  # a reward model's are
    assert read_value_scaling(base) is None


def test_an_adapter_has_its_own_not_those_of_its_base(made, tmp_path):
    tokenizer, base = byte_tokenizer(), str(made / "merged")
    model = with_adapter(create_critic_model(base, tokenizer, torch.float32), LORA)
    saving = plan("adapter", base, LORA, tmp_path / "out")
    save_hf_format(model, tokenizer, tmp_path / "out", ALONE, saving)
    assert read_statistics(str(tmp_path / "out")) is None


def test_scaling_says_what_it_does(made, capsys):
    merged, base = str(made / "merged"), str(made / "base")
    for choice in ("auto", "saved"):
        assert reward_scaling(choice, merged) == SAVED
        said = "reward scaling: (score - -1.5) / 0.25, by the 26 scores of step 2's evaluation\n"
        assert capsys.readouterr().out == said
    assert reward_scaling("auto", base) is None
    assert capsys.readouterr().out.startswith(f"reward scaling: none, {base} holds no {FILE}")
    assert reward_scaling("none", merged) is None and reward_scaling("auto", None) is None
    assert capsys.readouterr().out == ""
    scores = torch.tensor([-1.5, -1.0])
    assert SAVED.scaled(scores).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("model", "words"),
    [("base", "base: no reward_statistics.json in it; train"), (None, "there is no reward model;")],
)
def test_saved_needs_them(made, model, words):
    with pytest.raises(UserError) as caught:
        reward_scaling("saved", model and str(made / model))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"mean": 1.0}', "no mean, std, count and data"),
        (json.dumps(vars(SAVED) | {"std": "wide"}), "no mean, std, count and data"),
        (json.dumps(vars(SAVED) | {"std": 0.0}), "mean -1.5, std 0.0; train step 2 again"),
        (json.dumps(vars(SAVED) | {"mean": float("nan")}), "mean nan, std 0.25"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, words):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError) as caught:
        read_statistics(str(tmp_path))
    assert words in str(caught.value) and FILE in str(caught.value)


def test_scores_without_spread_are_not_saved(capsys):
    figures = {"mean_score": 0.1, "score_std": 1e-9}
    assert scores_summary(figures, 13, "rows") is None
    assert "no reward statistics are saved" in capsys.readouterr().out
    assert scores_summary({"mean_score": -1.5, "score_std": 0.25}, 13, "rows") == SAVED
