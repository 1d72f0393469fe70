"""Model folders: written whole or not at all, and loaded by transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from dschat.errors import UserError
from dschat.models import save as checkpoint
from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import RewardModel, create_critic_model, scores_at_end
from dschat.models.save import check_output_dir, save_hf_format
from dschat.utils.distributed import Distributed
from dschat.utils.module.lora import lora_layers
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers import tiny
from tests.helpers.adapters import ALONE, plan, save_base, with_adapter
from tests.helpers.rounding import DIFFERENT, LOGITS

ROWS = tiny.token_rows(3, seed=8)
IDS, MASK = tiny.padded(ROWS)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK.long()).logits


@torch.no_grad()
def scores_of(model: RewardModel) -> torch.Tensor:
    return scores_at_end(model(IDS, MASK), MASK)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_causal_lm_loads_in_transformers(tmp_path: Path, tiny_tokenizer, name: str):
    model = tiny.adapted(tiny.ARCHITECTURES[name]())
    model.generation_config = GenerationConfig(max_new_tokens=5, do_sample=True, **tiny.SPECIAL)
    save_hf_format(model, tiny_tokenizer, tmp_path / "out", ALONE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=LOGITS)
    assert not torch.allclose(
        logits_of(loaded), logits_of(tiny.ARCHITECTURES[name]()), atol=DIFFERENT
    )
    assert loaded.generation_config.max_new_tokens == 5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert tokenizer("hi").input_ids == tiny_tokenizer("hi").input_ids
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (tiny.PAD, tiny.EOS)
    written = set(files(tmp_path / "out"))
    assert "model.safetensors" in written and not any(name.endswith(".bin") for name in written)
    ours = create_hf_model(str(tmp_path / "out"), tiny_tokenizer, torch.float32)
    assert torch.equal(logits_of(ours), logits_of(loaded))


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_reward_model_loads_in_transformers_and_here(tmp_path: Path, tiny_tokenizer, name: str):
    model = tiny.adapted(tiny.reward_model(name))
    if name == "opt-projected":  # as wide as the projection, not as the layers
        assert model.v_head.in_features == 16
    save_hf_format(model, tiny_tokenizer, tmp_path / "out", ALONE)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert theirs.config.num_labels == 1
    torch.testing.assert_close(logits_of(theirs)[:, 0], scores_of(model), rtol=0, atol=LOGITS)
    ours = create_critic_model(str(tmp_path / "out"), tiny_tokenizer, torch.float32).eval()
    torch.testing.assert_close(scores_of(ours), scores_of(model), rtol=0, atol=LOGITS)
    ours.keep_reward_head()  # the critic's own copy stays in memory
    save_hf_format(ours, tiny_tokenizer, tmp_path / "again", ALONE)
    again = create_critic_model(str(tmp_path / "again"), tiny_tokenizer, torch.float32).eval()
    assert torch.equal(scores_of(again), scores_of(ours))


def test_bf16_stays_bf16_on_disk(tmp_path: Path, tiny_tokenizer):
    save_hf_format(tiny.tiny_llama().bfloat16(), tiny_tokenizer, tmp_path / "out", ALONE)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["causal", "reward"])
def test_saving_leaves_the_live_module_as_it_was(tmp_path: Path, tiny_tokenizer, kind: str):
    model = tiny.adapted(tiny.tiny_llama() if kind == "causal" else tiny.reward_model()).train()
    twin, config = copy.deepcopy(model), model.config.to_dict()
    save_hf_format(model, tiny_tokenizer, tmp_path / "out", ALONE)
    for (name, old), new in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) and old.requires_grad == new.requires_grad, name
    assert model.training and model.config.to_dict() == config
    assert len(lora_layers(model)) == 14
    for module in (model, twin):
        values = module(IDS, MASK) if kind == "reward" else module(input_ids=IDS).logits
        values.square().mean().backward()
    for old, new in zip(twin.parameters(), model.parameters(), strict=True):
        assert (old.grad is None and new.grad is None) or torch.equal(old.grad, new.grad)


def test_folder_with_logs_keeps_them_and_loses_old_weights(tmp_path: Path, tiny_tokenizer):
    out = tmp_path / "out"
    (out / "tensorboard").mkdir(parents=True)
    (out / "tensorboard/events").write_text("events")
    (out / "pytorch_model.bin").write_text("of an older model")
    (out / "model-00001-of-00002.safetensors").write_text("of an older model")
    with (out / "metrics.jsonl").open("w") as log:
        log.write("first\n")
        log.flush()
        save_hf_format(tiny.tiny_llama(), tiny_tokenizer, out, ALONE)
        log.write("second\n")  # a log that is open goes on
    assert (out / "metrics.jsonl").read_text() == "first\nsecond\n"
    assert (out / "tensorboard/events").read_text() == "events"
    assert [p.name for p in out.glob("*model*") if p.suffix != ".json"] == ["model.safetensors"]
    assert torch.equal(
        logits_of(AutoModelForCausalLM.from_pretrained(out)), logits_of(tiny.tiny_llama())
    )
    save_hf_format(tiny.tiny_llama(seed=1), tiny_tokenizer, out, ALONE)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits_of(loaded), logits_of(tiny.tiny_llama(seed=1)))
    assert (out / "metrics.jsonl").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_each_kind_of_output_leaves_nothing_of_another(tmp_path: Path, tiny_tokenizer):
    """One folder, written in each mode after each other: what lies there is of the last alone."""
    base, out, lora = (
        save_base(tmp_path / "base", "llama"),
        tmp_path / "out",
        LoraConfig(lora_dim=4),
    )
    model = with_adapter(create_hf_model(base, tiny_tokenizer, torch.float32), lora)
    out.mkdir()
    (out / "metrics.jsonl").write_text("kept")
    adapter = {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    merged = {"config.json", "model.safetensors", "generation_config.json"} | tokenizer
    expected = {
        "merged": merged,
        "adapter": adapter | tokenizer,
        "both": merged | {f"adapter/{name}" for name in adapter | tokenizer},
    }
    for mode in ("merged", "adapter", "both", "adapter", "merged", "both", "merged"):
        save_hf_format(model, tiny_tokenizer, out, ALONE, plan(mode, base, lora, out))
        assert files(out).keys() == expected[mode] | {"metrics.jsonl"}, mode
        ours = create_hf_model(str(out), tiny_tokenizer, torch.float32).eval()
        torch.testing.assert_close(logits_of(ours), logits_of(model), rtol=0, atol=LOGITS)
    (out / "adapter").mkdir()
    (out / "adapter/notes.txt").write_text("of the user")
    (out / "adapter_model.bin").write_text("of an older model")
    save_hf_format(model, tiny_tokenizer, out, ALONE)
    assert files(out).keys() == merged | {"metrics.jsonl", "adapter/notes.txt"}


def test_adapter_alone_gathers_its_own_tensors_only(tmp_path: Path, tiny_tokenizer, monkeypatch):
    gathered = []
    original = checkpoint.consolidated_state_dict

    def consolidated(module, rank, wanted=None):
        state = original(module, rank, wanted)
        gathered.append(state.keys())
        return state

    monkeypatch.setattr(checkpoint, "consolidated_state_dict", consolidated)
    base, lora = save_base(tmp_path / "base", "llama"), LoraConfig(lora_dim=4)
    model = with_adapter(create_hf_model(base, tiny_tokenizer, torch.float32), lora)
    for mode in ("adapter", "both"):
        out = tmp_path / mode
        save_hf_format(model, tiny_tokenizer, out, ALONE, plan(mode, base, lora, out))
    assert gathered == 2 * [{name for name in model.state_dict() if ".lora_" in name}]


def test_failure_while_writing_an_adapter_changes_nothing(
    tmp_path: Path, tiny_tokenizer, monkeypatch
):
    base, out, lora = (
        save_base(tmp_path / "base", "llama"),
        tmp_path / "out",
        LoraConfig(lora_dim=4),
    )
    model = with_adapter(create_hf_model(base, tiny_tokenizer, torch.float32), lora)
    save_hf_format(model, tiny_tokenizer, out, ALONE, plan("both", base, lora, out))
    before = files(out)

    def fail(outline, state, folder):
        (folder / "adapter_config.json").write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "write_adapter", fail)
    for mode in ("both", "adapter"):
        with pytest.raises(UserError, match="No space left on device; no model was written"):
            save_hf_format(model, tiny_tokenizer, out, ALONE, plan(mode, base, lora, out))
    assert files(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path, tiny_tokenizer):
    model, out = tiny.tiny_llama(), tmp_path / "out"
    save_hf_format(model, tiny_tokenizer, out, ALONE)
    before = files(out)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("inf")
    with pytest.raises(UserError) as error:
        save_hf_format(model, tiny_tokenizer, out, ALONE)
    assert str(error.value) == (
        f"output_dir {out}: model.layers.1.mlp.up_proj.weight is not finite in the trained model; "
        "no model was written, what was there stays; fix that, and start again, with a lower "
        "learning rate"
    )
    assert files(out) == before


def test_link_to_a_folder_stays_a_link(tmp_path: Path, tiny_tokenizer):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_hf_format(tiny.tiny_llama(), tiny_tokenizer, tmp_path / "link", ALONE)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("owner", [LlamaConfig, PreTrainedTokenizerFast])
def test_failure_while_writing_changes_nothing(tmp_path: Path, tiny_tokenizer, monkeypatch, owner):
    out = tmp_path / "out"
    save_hf_format(tiny.tiny_llama(), tiny_tokenizer, out, ALONE)
    before = files(out)

    def fail(self, folder, **_):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "half").write_text("of a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(owner, "save_pretrained", fail)
    for target in (out, tmp_path / "new"):
        with pytest.raises(UserError, match="No space left on device; no model was written"):
            save_hf_format(tiny.tiny_llama(seed=1), tiny_tokenizer, target, ALONE)
    assert files(out) == before
    assert list((tmp_path / "new").iterdir()) == []


def test_only_rank_0_writes(tmp_path: Path, tiny_tokenizer):
    peer = Distributed(1, 2, 1, torch.device("cpu"))
    save_hf_format(tiny.tiny_llama(), tiny_tokenizer, tmp_path / "out", peer)
    assert not list(tmp_path.iterdir())


def test_output_dir_is_checked_before_work(tmp_path: Path, monkeypatch):
    check_output_dir(None)
    check_output_dir(str(tmp_path / "new/deep"))
    assert (tmp_path / "new/deep").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        check_output_dir(str(tmp_path / "file"))
    with pytest.raises(UserError, match="give a writable one"):
        check_output_dir(str(tmp_path / "file/below"))
    monkeypatch.chdir(tmp_path / "new/deep")
    for working in (".", "..", str(tmp_path)):
        check_output_dir(working)
