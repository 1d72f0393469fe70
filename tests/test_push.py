"""What goes to the Hub, and what does not; the Hub itself is a stub."""

import json
from pathlib import Path

import pytest

from dschat import push as program
from dschat.errors import UserError
from dschat.utils.addresses import check_repository
from tests.helpers.hub import Hub, offer

FILES = ("config.json", "model.safetensors", "tokenizer.json", "README.md", "training_curve.png")
OTHERS = ("metrics.jsonl", "report.html", "run.json", "training.log", "evaluation.json")


@pytest.fixture
def hub(monkeypatch) -> Hub:
    return offer(Hub(), monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run with a checkpoint, and an adapter beside the merged weights."""
    made = tmp_path / "out"
    for name in (*FILES, *OTHERS, "checkpoints/model.safetensors", "adapter/README.md"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text("{}")
    return made


def test_the_models_files_go_and_nothing_else(folder, hub, capsys):
    program.main([str(folder), "me/model"])
    assert hub.files == {"me/model": set(FILES)} and hub.private == {"me/model": True}
    assert capsys.readouterr().out == "https://hub/me/model\n"
    program.main([str(folder), "me/open", "--public"])
    assert hub.private["me/open"] is False


def test_nothing_goes_to_a_repository_that_more_people_read_than_asked(folder, hub):
    hub.private = {"me/open": False, "me/closed": True}
    with pytest.raises(UserError, match="me/open: is public on the Hub; add --public"):
        program.main([str(folder), "me/open"])
    with pytest.raises(UserError, match="me/closed: is private on the Hub; drop --public"):
        program.main([str(folder), "me/closed", "--public"])
    assert hub.files == {}


def adapter_on(folder: Path, base: str) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_model.safetensors").touch()
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_goes_where_its_base_is_on_the_hub(folder, hub):
    adapter_on(folder, "facebook/opt-125m")
    program.main([str(folder), "me/adapter"])
    assert "adapter_config.json" in hub.files["me/adapter"]
    (folder / "config.json").touch()
    adapter_on(folder, str(folder))
    with pytest.raises(UserError, match="on this machine alone; push the merged model"):
        program.main([str(folder), "me/adapter"])
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        program.main([str(folder), "me/adapter"])


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("config.json", None, "holds no finished model; give one that a run has finished"),
        ("config.json", "actor/config.json", "holds no finished model; give .*actor"),
        ("model.safetensors", None, "holds no weights"),
        (None, ".model.tmp/config.json", "a model is being written there"),
        (None, ".model.new/config.json", "a model is being written there"),
    ],
)
def test_a_folder_that_is_not_finished_stays_here(folder, hub, remove, add, message):
    if remove is not None:
        (folder / remove).unlink()
    if add is not None:
        (folder / add).parent.mkdir()
        (folder / add).write_text("{}")
    with pytest.raises(UserError, match=message):
        program.main([str(folder), "me/model"])
    assert hub.files == {} == hub.private


def test_names_keys_and_refusals_are_one_line(folder, hub, monkeypatch):
    check_repository("me/my-model.1", "repository")
    for name in ("model", "me/../x", "me/a b", "./me/model"):
        with pytest.raises(UserError, match="give OWNER/NAME, as in me/my-model"):
            program.main([str(folder), name])
    with pytest.raises(UserError) as error:
        program.main([str(folder), "others/model"])
    assert str(error.value) == "others/model: PermissionError: 403 Forbidden: you are not others"
    with pytest.raises(UserError, match="no/such: is no folder"):
        program.main(["no/such", "me/model"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set: nothing goes to the Hub"):
        program.main([str(folder), "me/model"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="run: hf auth login, or set HF_TOKEN"):
        program.main([str(folder), "me/model"])
    assert hub.files == {}
