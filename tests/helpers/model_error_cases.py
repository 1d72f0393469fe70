"""Model folders that cannot be used, each with what the one line about it says."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, MusicgenConfig, T5Config, ViTConfig

from tests.helpers import tiny

WEIGHTS = "model.safetensors"


class RunsCode:
    """A pickle that calls a function when it is read."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("code-ran",)


def _cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _as_bin(folder: Path, content: bytes | None = None) -> None:
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "pytorch_model.bin")
    if content is not None:
        (folder / "pytorch_model.bin").write_bytes(content)


def _in_shards(folder: Path, name: str = WEIGHTS) -> Path:
    """Two files and their index; the second file."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {}
    for i, part in enumerate(parts):
        shard = dict(list(state.items())[i::2])
        save_file(shard, part, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, part.name)
    index = {"metadata": {}, "weight_map": where}
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    return parts[1]


def _cut_shard(folder: Path) -> None:
    part = _in_shards(folder)
    part.write_bytes(part.read_bytes()[:-7])


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _without_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))


def _twice(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace("{", '{"hidden_size": 32,', 1))


def _few_rows(folder: Path) -> None:
    tiny.save_llama_folder(folder, vocab_size=64)


def _value(value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        state["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def _terabytes(folder: Path) -> None:
    """A header that tells of more than there is."""
    entry = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(100)
    (folder / WEIGHTS).write_bytes(content)


# What spoils a folder, and what must be said; found before data or weights are read.
EARLY: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (_cut, r"model.safetensors cannot be read \(.*incomplete metadata"),
    "empty": (_text(WEIGHTS, ""), r"model.safetensors cannot be read \(.*header too small"),
    "garbage": (_text(WEIGHTS, "x" * 999), r"model.safetensors cannot be read \("),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"no model.safetensors in it"),
    "shard missing": (
        lambda folder: _in_shards(folder).unlink(),
        r"names 2 files, 1 of them are not there \(model-00002-of-00002.safetensors\)",
    ),
    "shard cut": (_cut_shard, r"model-00002-of-00002.safetensors cannot be read"),
    "index of nothing": (
        lambda folder: (_in_shards(folder), _text(f"{WEIGHTS}.index.json", "{}")(folder)),
        r"model.safetensors.index.json names no files of weights",
    ),
    "pickle with code": (
        lambda folder: _as_bin(folder, pickle.dumps({"a": RunsCode()}, protocol=2)),
        r"pytorch_model.bin cannot be read \(UnpicklingError\)",
    ),
    "pickle cut": (lambda folder: _as_bin(folder, b"PK\3\4" + 99 * b"x"), r"bin cannot be read \("),
    "pickle empty": (lambda folder: _as_bin(folder, b""), r"bin cannot be read \(EOFError\)"),
    "pickle of a list": (
        lambda folder: (_as_bin(folder), torch.save([1], folder / "pytorch_model.bin")),
        r"bin cannot be read \(no tensors by name\)",
    ),
    "T5": (lambda folder: T5Config().save_pretrained(folder), r"'t5' has encoder and decoder"),
    "BART": (lambda folder: BartConfig().save_pretrained(folder), r"'bart' has encoder and"),
    "music": (
        lambda folder: MusicgenConfig().save_pretrained(folder),
        r"'musicgen' has encoder and decoder",
    ),
    "images": (lambda folder: ViTConfig().save_pretrained(folder), r"'vit' writes no text; give"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no readable config.json"),
    "config cut": (_text("config.json", '{"model'), r"no readable config.json"),
    "config nested": (_text("config.json", "[" * 100_000), r"config.json \(nested too deeply\)"),
    "config null": (_text("config.json", "null"), r"config.json \(it holds no JSON object\)"),
    "config a list": (_text("config.json", "[]"), r"no readable config.json"),
    "no type": (_without_type, r"no readable config.json \(.*model_type"),
    "key twice": (_twice, r"no readable config.json \('hidden_size' stands in it 2 times\)"),
    "unknown type": (_config(model_type="llamma"), r"no readable config.json \(.*llamma"),
    "wrong value": (_config(hidden_size="x"), r"no readable config.json \(.*expected int, got str"),
    "layers without end": (_config(num_hidden_layers=10**8), r"says num_hidden_layers 100,000,000"),
    "terabytes": (lambda folder: _terabytes(folder), r"cannot be read \(.*incomplete metadata"),
    "no such dtype": (_config(dtype="float33"), r"no readable config.json \(.*float33"),
    "generation config cut": (
        _text("generation_config.json", '{"max'),
        r"generation_config.json cannot be read \(OSError.*; copy it again, or remove it",
    ),
    "generation config a list": (
        _text("generation_config.json", "[]"),
        r"generation_config.json cannot be read \(TypeError",
    ),
    "packed weights": (
        _config(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"its weights are quantised, and cannot be read here \(.*; give the model that they",
    ),
    "another's tokenizer": (_few_rows, r"195 of the tokenizer's 259 tokens have no"),
}
# Found when the weights are loaded.
LATE: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (_value(float("nan")), r"NaN or infinity in 1 of its \d+ tensors \(.*1.mlp.up_proj"),
    "infinity": (_value(float("-inf")), r"NaN or infinity in 1 of its"),
    "no such activation": (_config(hidden_act="none"), r"config.json makes no model \(KeyError"),
    "negative widths": (_config(intermediate_size=-4), r"config.json makes no model \(RuntimeErr"),
    "other layers": (_config(num_hidden_layers=3), r"weights do not fit the architecture"),
    "other widths": (_config(intermediate_size=40), r"weights do not fit .*mismatched"),
    "other family": (
        _config(model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"]),
        r"weights do not fit the architecture",
    ),
}


def spoilt(folder: Path, case: tuple[Callable[[Path], object], str]) -> tuple[str, str]:
    """A folder of a tiny Llama that the case spoiled, and the message to expect."""
    tiny.save_llama_folder(folder)
    case[0](folder)
    return str(folder), case[1]
