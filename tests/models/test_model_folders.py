"""Folders that hold no usable model end every program in one line, most before data is read."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from dschat.errors import UserError
from dschat.models import config as model_config
from dschat.models.causal_lm import check_model_folder, create_hf_model
from dschat.models.config import load_config, on_meta
from dschat.models.reward_head import check_language_model, check_reward_head, read_head
from dschat.models.reward_model import RewardModel, create_critic_model
from dschat.models.save import save_hf_format
from dschat.models.vocabulary import check_vocabulary
from dschat.utils import zero
from tests.helpers import tiny
from tests.helpers.adapters import ALONE
from tests.helpers.families import save_family
from tests.helpers.model_error_cases import EARLY, LATE, _as_bin, _in_shards, spoilt


def assert_one_line(act, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", EARLY)
def test_found_by_header_and_config(tmp_path: Path, tiny_tokenizer, monkeypatch, name: str):
    """By the check before data, and by each way to load."""
    monkeypatch.chdir(tmp_path)
    folder, message = spoilt(tmp_path / "m", EARLY[name])
    assert_one_line(lambda: check_model_folder(folder, tiny_tokenizer), message)
    for create in (create_hf_model, create_critic_model):
        options = {"init_head": True} if create is create_critic_model else {}
        assert_one_line(
            lambda c=create, o=options: c(folder, tiny_tokenizer, torch.float32, **o), message
        )
    assert not (tmp_path / "code-ran").exists()


def test_a_model_that_is_built_without_end_is_one_line(tmp_path: Path, monkeypatch):
    def build(config):
        while True:
            pass

    monkeypatch.setattr(model_config, "_SECONDS", 0.2)
    folder = tiny.save_llama_folder(tmp_path / "m")
    message = r"config.json has no end \(it takes more than 0.2 s\); copy"
    assert_one_line(lambda: on_meta(str(folder), build), message)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 10**9}))
    assert_one_line(lambda: load_config(str(folder)), message)


@pytest.mark.parametrize("name", ["cut", "shard cut", "pickle with code", "T5"])
def test_found_where_a_head_is_looked_for(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    folder, message = spoilt(tmp_path / "m", EARLY[name])
    if name != "T5":
        assert_one_line(lambda: check_reward_head(folder), message)
    assert_one_line(lambda: check_language_model(folder), message)
    assert not (tmp_path / "code-ran").exists()


@pytest.mark.parametrize("name", LATE)
def test_found_in_the_weights(tmp_path: Path, tiny_tokenizer, name: str):
    folder, message = spoilt(tmp_path / "m", LATE[name])
    assert_one_line(lambda: create_hf_model(folder, tiny_tokenizer, torch.float32), message)
    assert_one_line(
        lambda: create_critic_model(folder, tiny_tokenizer, torch.float32, init_head=True), message
    )


def test_a_head_that_is_not_finite_is_found(tmp_path: Path, tiny_tokenizer):
    save_hf_format(tiny.reward_model(), tiny_tokenizer, tmp_path / "good", ALONE)
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    weights = load_file(tmp_path / "bad/model.safetensors")
    weights["score.weight"][0, 3] = torch.inf
    save_file(weights, tmp_path / "bad/model.safetensors", metadata={"format": "pt"})
    create_critic_model(str(tmp_path / "good"), tiny_tokenizer, torch.float32)
    bad = str(tmp_path / "bad")
    assert_one_line(
        lambda: create_critic_model(bad, tiny_tokenizer, torch.float32),
        r"NaN or infinity in 1 of its \d+ tensors \(v_head.weight\)",
    )


def test_what_fills_up_a_shard_is_not_looked_at(monkeypatch):
    """Two ranks share 3 elements in shards of 2; the fourth is what was in memory."""
    parameter = nn.Parameter(torch.empty(0))
    vars(parameter).update(ds_id=0, ds_shape=(3,), ds_process_group=None)
    parameter.ds_tensor = torch.tensor([5.0, torch.nan])
    for rank, expected in ((0, [5.0, torch.nan]), (1, [5.0]), (2, [])):
        monkeypatch.setattr(zero.dist, "get_rank", lambda group, rank=rank: rank)
        values = zero.local_values(parameter)
        torch.testing.assert_close(values, torch.tensor(expected), equal_nan=True)


def test_usable_files_pass(tmp_path: Path, tiny_tokenizer):
    """In shards, in a pickle of tensors, in one of the old format."""
    for kind in ("shards", "bin"):
        folder = tiny.save_llama_folder(tmp_path / kind)
        (_in_shards if kind == "shards" else _as_bin)(folder)
        check_model_folder(str(folder), tiny_tokenizer)
        create_hf_model(str(folder), tiny_tokenizer, torch.float32)
    state = torch.load(tmp_path / "bin/pytorch_model.bin")
    old = {"_use_new_zipfile_serialization": False}
    torch.save(state, tmp_path / "bin/pytorch_model.bin", **old)
    check_model_folder(str(tmp_path / "bin"), tiny_tokenizer)


@pytest.mark.parametrize(
    ("rows", "tokens", "fits"),
    [(250, 259, True), (50_304, 50_257, True), (400, 500, True), (399, 500, False)],
)
def test_a_tokenizer_may_lack_a_fifth_of_its_rows(rows: int, tokens: int, fits: bool):
    if fits:
        check_vocabulary("m", rows, tokens)
    else:
        assert_one_line(lambda: check_vocabulary("m", rows, tokens), "101 of the tokenizer's 500")


def test_tables_in_an_adapter_count_as_the_models_own(tmp_path: Path, tiny_tokenizer):
    """A base of 64 rows under an adapter that brings 264: its tokenizer fits."""
    small = tiny.save_llama_folder(tmp_path / "base", vocab_size=64)
    model = get_peft_model(
        tiny.tiny_llama(vocab_size=64),
        PeftLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    model.base_model.model.resize_token_embeddings(264, mean_resizing=False)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    config = tmp_path / "adapter/adapter_config.json"
    written = json.loads(config.read_text()) | {"base_model_name_or_path": str(small)}
    config.write_text(json.dumps(written))
    check_model_folder(str(tmp_path / "adapter"), tiny_tokenizer)
    loaded = create_hf_model(str(tmp_path / "adapter"), tiny_tokenizer, torch.float32)
    assert loaded.config.vocab_size == 264


def test_growing_is_said(tmp_path: Path, tiny_tokenizer, capfd):
    folder = str(tiny.save_llama_folder(tmp_path / "m", vocab_size=250))
    create_hf_model(folder, tiny_tokenizer, torch.float32)
    said = capfd.readouterr().out
    assert "its embedding grows from 250 to 264 rows for the tokenizer's 259 tokens" in said


@pytest.mark.parametrize("kind", ["classifier", "trunk and head"])
def test_a_reward_model_is_no_language_model(tmp_path: Path, tiny_tokenizer, kind: str):
    """And the reverse is told too; chat and evaluation load by the same functions."""
    language = str(tiny.save_llama_folder(tmp_path / "language"))
    if kind != "classifier":
        language = save_family(tmp_path / "granite", "granite")
    reward = create_critic_model(language, tiny_tokenizer, torch.float32, init_head=True)
    save_hf_format(reward, tiny_tokenizer, tmp_path / "reward", ALONE)
    folder = str(tmp_path / "reward")
    words = r"is a reward model \(it holds a head\)[;,] give a language model"
    assert_one_line(lambda: check_language_model(folder), words)
    assert_one_line(lambda: create_hf_model(folder, tiny_tokenizer, torch.float32), words)
    assert read_head(folder) is not None and read_head(language) is None
    for act in (check_reward_head, lambda f: create_critic_model(f, tiny_tokenizer, torch.float32)):
        assert_one_line(lambda a=act: a(language), "no score.weight or v_head.weight in it")


def test_a_config_that_makes_no_model_is_told(tmp_path: Path):
    config = tiny.tiny_llama().config
    config.hidden_act = "nothing"
    config.save_pretrained(tmp_path)
    load_config(str(tmp_path))
    assert_one_line(
        lambda: on_meta(str(tmp_path), RewardModel.from_config),
        r"its config.json makes no model \(KeyError: .*nothing",
    )


def test_saved_files_have_the_modes_of_new_files(tmp_path: Path, tiny_tokenizer):
    """safetensors writes 0600 whatever the umask, which keeps colleagues out."""
    model = tiny.tiny_llama()
    save_hf_format(model, tiny_tokenizer, tmp_path / "m", ALONE)
    (tmp_path / "new").touch()
    expected = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "m").iterdir()}
    assert set(modes.values()) == {expected}, modes
    assert load_file(tmp_path / "m/model.safetensors")
