"""Weights that are merged and written one by one: the same bytes as all at once, in less memory."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from dschat.models import folder_plan, save, stream
from dschat.models.folder_plan import plan_folder
from dschat.models.reward_folder import RewardForm, reward_form
from dschat.models.reward_model import RewardModel
from dschat.models.save import save_hf_format
from dschat.models.stream import write_weights
from dschat.utils.module.lora import merged_state_dict
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.token_tables import add_token_rows
from dschat.utils.zero import consolidated_state_dict
from tests.helpers import tiny
from tests.helpers.adapters import ALONE, as_trained, options, with_adapter
from tests.helpers.families import FAMILIES, family_config
from tests.helpers.rounding import LOGITS
from tests.helpers.tiers import tiers


def causal(name: str, kind: str) -> nn.Module:
    return with_adapter(tiny.ARCHITECTURES[name](), LoraConfig(lora_dim=4, **options(kind, name)))


def with_rows(name: str) -> nn.Module:
    model = causal(name, "plain")
    return as_trained(add_token_rows(model, [3, 7]), seed=2)


def family(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(family_config(name))


def head_alone() -> nn.Module:
    """An adapter on the head of tied tables, which unties them."""
    lora = LoraConfig(lora_dim=4, lora_module_name=("lm_head",))
    return with_adapter(tiny.ARCHITECTURES["llama-tied"](), lora)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{f"{n} whole": tiny.ARCHITECTURES[n] for n in tiny.ARCHITECTURES},
    **{
        f"{n} {kind}": lambda n=n, kind=kind: causal(n, kind)
        for n in ("llama", "llama-tied", "gpt2", "opt")
        for kind in ("plain", "dora", "embedding", "whole embedding")
    },
    "llama rows": lambda: with_rows("llama"),
    "llama-tied rows": lambda: with_rows("llama-tied"),
    "llama-tied head": head_alone,
    **{f"reward {n}": lambda n=n: tiny.adapted(tiny.reward_model(n)) for n in ("llama", "opt")},
    **{  # families that transformers writes under other names, experts one by one
        f"{n} experts": lambda n=n: with_adapter(tiny.tiny_moe(n), LoraConfig(lora_dim=2))
        for n in tiny.MOE
    },
    **{
        f"family {n}": lambda n=n: AutoModelForCausalLM.from_config(family_config(n))
        for n in FAMILIES
    },
    "bf16": lambda: causal("llama", "plain").bfloat16(),
}
SMALL = 20_000  # bytes of a shard, a few weights
CORE = ["mixtral experts", "llama-tied head", "reward llama"]


def all_at_once(module: nn.Module, tokenizer, folder: Path, shard_bytes: int) -> None:
    """Merge the whole state, and let transformers write it."""
    merged = merged_state_dict(consolidated_state_dict(module, 0), module)
    if (form := form_of(module, tokenizer)) is not None:
        twin, merged = form.twin(), form.on_disk(merged)
    else:
        twin = folder_plan._meta_twin(module, merged)
    nn.Module.to(twin, next(iter(merged.values())).dtype)
    twin.save_pretrained(folder, state_dict=dict(merged), max_shard_size=shard_bytes)


def form_of(module: nn.Module, tokenizer) -> RewardForm | None:
    return reward_form(module.config, tokenizer) if isinstance(module, RewardModel) else None


def in_parts(module: nn.Module, tokenizer, folder: Path, shard_bytes: int) -> None:
    plan = plan_folder(module, form_of(module, tokenizer), shard_bytes)
    folder.mkdir()
    plan.write_config(folder)
    write_weights(plan, 0, lambda name, tensors: save_to(folder / name, tensors))


def save_to(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def tensors(folder: Path) -> dict[str, bytes]:
    found = [item for file in folder.glob("*.safetensors") for item in load_file(file).items()]
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in found}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", tiers(MODELS, CORE))
def test_the_same_bytes_as_all_at_once(tmp_path: Path, tiny_tokenizer, name: str):
    module = MODELS[name]().eval()
    for shard_bytes in (10**9, SMALL):
        whole, parts = tmp_path / f"whole-{shard_bytes}", tmp_path / f"parts-{shard_bytes}"
        all_at_once(module, tiny_tokenizer, whole, shard_bytes)
        in_parts(module, tiny_tokenizer, parts, shard_bytes)
        found, expected = files(parts), files(whole)
        if shard_bytes == SMALL and plan_folder(module, form_of(module, tiny_tokenizer)).converts:
            # transformers takes an expert for as large as all of them, and makes more files.
            found, expected = tensors(parts), tensors(whole)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
        assert ("model.safetensors.index.json" in files(parts)) == (shard_bytes == SMALL)
        shards = [load_file(file) for file in parts.glob("*.safetensors")]
        sizes = [(len(shard), sum(t.nbytes for t in shard.values())) for shard in shards]
        assert all(size <= shard_bytes or count == 1 for count, size in sizes)


def test_the_host_holds_a_shard_and_a_weight_at_most(tmp_path: Path, tiny_tokenizer, monkeypatch):
    """Bytes of all tensors that were copied to the host and are alive, after each copy."""
    alive, peak = 0, 0
    original = stream.on_host

    def gone(size: int) -> None:
        nonlocal alive
        alive -= size

    def counted(made, live):
        nonlocal alive, peak
        held = original(made, live)
        for tensor in held.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            alive += tensor.nbytes
            weakref.finalize(tensor, gone, tensor.nbytes)
        peak = max(peak, alive)
        return held

    monkeypatch.setattr(stream, "on_host", counted)
    module, shard = causal("llama", "plain"), SMALL
    in_parts(module, tiny_tokenizer, tmp_path / "out", shard)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    largest = max(p.nbytes for p in module.parameters())
    assert index["metadata"]["total_size"] > 3 * shard
    assert 0 < peak <= shard + largest
    assert alive == 0


def test_shards_load_in_transformers(tmp_path: Path, tiny_tokenizer, monkeypatch):
    module, out = causal("gpt2", "plain"), tmp_path / "out"
    monkeypatch.setattr(save, "plan_folder", lambda m, form: plan_folder(m, form, SMALL))
    save_hf_format(module, tiny_tokenizer, out, ALONE)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3
    ids, loaded = torch.tensor([[1, 5, 9]]), AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, module(ids).logits, rtol=0, atol=LOGITS)
