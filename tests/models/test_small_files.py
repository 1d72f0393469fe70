"""Which files of a model are digested: of a base, of the adapters on it, of the hub's cache."""

import hashlib
import json
from pathlib import Path

from dschat.models import small_files
from dschat.models.small_files import NAMES, TEMPLATES, small_file_digests
from dschat.utils.module.model_source import ModelSource


def test_an_adapter_comes_with_its_base(tmp_path: Path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").touch()  # not read
    lora = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    digests = small_file_digests(str(adapter))
    names = [*NAMES, TEMPLATES]
    assert {*digests} == {*names, *(f"1/{name}" for name in names)}
    there = {name for name, digest in digests.items() if digest is not None}
    assert there == {"config.json", "1/adapter_config.json"}
    assert digests["config.json"] == hashlib.sha256(b"{}").hexdigest()


def test_further_chat_templates_count_by_name_and_content(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    seen = [small_file_digests(str(tmp_path))[TEMPLATES]]
    assert seen == [None]
    (tmp_path / TEMPLATES).mkdir()
    for name, text in (("tool_use", "a"), ("tool_use", "b"), ("default", "b")):
        (tmp_path / TEMPLATES / f"{name}.jinja").write_text(text)
        seen.append(small_file_digests(str(tmp_path))[TEMPLATES])
    (tmp_path / TEMPLATES / "tool_use.jinja").unlink()
    seen.append(small_file_digests(str(tmp_path))[TEMPLATES])
    assert len({*seen}) == 5


def test_of_a_model_on_the_hub_files_that_are_cached(tmp_path: Path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")

    def cached(repository: str, name: str) -> str | None:
        path = tmp_path / name
        return str(path) if repository == "some/model" and path.exists() else None

    monkeypatch.setattr(small_files, "resolve_model", lambda name: ModelSource(name, base=name))
    monkeypatch.setattr(small_files, "try_to_load_from_cache", cached)
    assert {*small_file_digests("some/model")} == {"config.json"}
