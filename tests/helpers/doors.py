"""Model folders that hold code, behind every door that a careless reader would open."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.helpers import tiny

KEEP = "model.safetensors"
NAMES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
NEVER_RUN = "needs code that comes with it, which is never run; give a model that transformers"


class Payload:
    """Pickled, a call of exec."""

    def __init__(self, code: str):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


def mark(folder: Path) -> Path:
    """The file that is there once anything of a folder has run."""
    return folder.with_name(f"{folder.name}-ran")


def code_of(folder: Path) -> str:
    """Source that leaves the mark."""
    return f"open({str(mark(folder))!r}, 'a').write(__name__)\n"


def change_json(file: Path, **changes: object) -> None:
    """Set entries of a JSON object, made where there is no file."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | changes))


def write_pickle(folder: Path, name: str) -> None:
    """A file that runs code in whoever unpickles it."""
    (folder / name).write_bytes(pickle.dumps({"w": Payload(code_of(folder))}, protocol=2))


def plant_inert(folder: Path) -> None:
    """Code that nothing needs: with it the folder works as without it."""
    for name in ("modeling_llama.py", "evil.py", "handler.py", "conftest.py", "tokenizer.py"):
        (folder / name).write_text(code_of(folder))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code_of(folder))
    change_json(folder / "config.json", auto_map={name: "evil.Evil" for name in NAMES})
    change_json(folder / "generation_config.json", custom_generate=str(folder))
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "pytorch_model.bin"):
        write_pickle(folder, name)


def _own_class(folder: Path) -> None:
    plant_inert(folder)
    change_json(folder / "config.json", model_type="evil")


def _own_tokenizer(folder: Path) -> None:
    plant_inert(folder)
    own = {"AutoTokenizer": ["evil.Evil", "evil.EvilFast"]}
    change_json(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="EvilTokenizer")


def _kernel(folder: Path) -> None:
    change_json(folder / "config.json", attn_implementation="someone/attention")


def _pickled_weights(folder: Path) -> None:
    plant_inert(folder)
    (folder / KEEP).unlink()


def _outside(folder: Path) -> None:
    outside = folder.with_name(f"{folder.name}-outside.safetensors")
    state = load_file(folder / KEEP)
    (folder / KEEP).unlink()
    save_file(state, outside, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, f"../{outside.name}")}
    (folder / f"{KEEP}.index.json").write_text(json.dumps(index))


def _template(text: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["prompt_format"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "chat_template.jinja").write_text(text.replace("MARK", str(mark(folder))))

    return plant


def _adapter(folder: Path) -> None:
    base = folder.with_name(f"{folder.name}-base")
    folder.rename(base)
    folder.mkdir()
    (folder / "evil.py").write_text(code_of(folder))
    change_json(
        folder / "adapter_config.json",
        peft_type="LORA",
        task_type=None,
        base_model_name_or_path=str(base),
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"},
    )
    write_pickle(folder, "adapter_model.bin")


SHELL = "{{ cycler.__init__.__globals__.os.system('touch MARK') }}"
# What needs the code, and what must be said.
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "own class": (_own_class, NEVER_RUN),
    "own tokenizer": (_own_tokenizer, NEVER_RUN),
    "kernel": (_kernel, "its config.json names the kernel 'someone/attention', and no code of a"),
    "pickled weights": (_pickled_weights, "pytorch_model.bin cannot be read (UnpicklingError"),
    "files outside": (_outside, "-outside.safetensors', which is outside the folder; copy the"),
    "template with a shell": (_template(SHELL), "the chat template refuses the conversation"),
    "template with escapes": (
        _template("{{ raise_exception('\x1b]0;owned\x07\x9b2J\u202e') }}"),
        "(\\x1b]0;owned\\x07\\x9b2J\\u202e)",
    ),
    "adapter": (_adapter, "adapter_model.bin cannot be read (UnpicklingError); copy the"),
}


def planted(folder: Path, plant: Callable[[Path], None]) -> str:
    """A tiny Llama with code planted in its folder."""
    tiny.save_llama_folder(folder, max_position_embeddings=256)
    plant(folder)
    return str(folder)
