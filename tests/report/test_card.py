"""Model cards: what they say, that the Hub reads their fields, that a user's page stays."""

import json
import os
from pathlib import Path

import pytest
import yaml

from dschat.errors import UserError
from dschat.report.card import CARD, CURVE, is_untouched, write_cards
from dschat.train.metrics import LogConfig, MetricLogger
from tests.report.test_page import EVIL, write_lines


def describe(folder: Path, program: str, **settings: object) -> None:
    (folder / "run.json").write_text(json.dumps({"program": program, "settings": settings}))


def model(folder: Path, adapter: bool = False) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / ("adapter_config.json" if adapter else "config.json")).write_text("{}")
    (folder / ("adapter_model.safetensors" if adapter else "model.safetensors")).write_text("")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of SFT with a merged model and its adapter."""
    lines = [{"kind": "eval", "step": 0, "loss": 2.5}, {"kind": "train", "step": 1, "loss": 2.0}]
    lines += [{"kind": "train", "step": 2, "loss": 1.0}, {"kind": "eval", "step": 2, "loss": 1.5}]
    write_lines(tmp_path / "metrics.jsonl", lines)
    data = ["Dahoas/rm-static", "/home/somebody/private/rows.jsonl"]
    describe(tmp_path, "sft", model_name_or_path="facebook/opt-125m", data_path=data, lora_dim=8)
    model(tmp_path)
    model(tmp_path / "adapter", adapter=True)
    return tmp_path


def fields_of(folder: Path) -> dict:
    _, front, _ = (folder / CARD).read_text().split("---\n", 2)
    return yaml.safe_load(front)


def test_a_model_and_its_adapter_have_cards(run: Path):
    assert write_cards(run) == [run / CARD, run / "adapter" / CARD]
    assert fields_of(run) == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dschat", "sft"],
        "base_model": "facebook/opt-125m",
        "base_model_relation": "finetune",
        "datasets": ["Dahoas/rm-static"],
    }
    inner = fields_of(run / "adapter")
    assert inner["library_name"] == "peft" and inner["base_model_relation"] == "adapter"
    text = (run / CARD).read_text()
    assert "| loss | 2.5 | 1.5 |" in text and f"({CURVE})" in text and '"lora_dim": 8' in text
    assert "rows.jsonl" in text and "somebody" not in text  # nothing about this machine
    assert (run / "adapter" / CURVE).read_bytes()[:4] == b"\x89PNG"
    assert "AutoPeftModelForCausalLM" in (run / "adapter" / CARD).read_text()


def test_the_hub_reads_the_fields(run: Path):
    from huggingface_hub import ModelCard

    write_cards(run)
    data = ModelCard.load(run / CARD).data
    assert (data.base_model, data.license) == ("facebook/opt-125m", "unknown")


def test_a_users_page_stays(run: Path):
    (run / "adapter" / CARD).write_text("mine\n")
    assert write_cards(run) == [run / CARD]
    first = (run / CARD).read_text()
    assert is_untouched(first) and write_cards(run) == [run / CARD]  # its own it replaces
    assert (run / CARD).read_text() == first
    (run / CARD).write_text(first.replace("license: unknown", "license: mit"))
    assert write_cards(run) == [] and "license: mit" in (run / CARD).read_text()
    assert (run / "adapter" / CARD).read_text() == "mine\n"
    (run / CARD).unlink()
    os.mkfifo(run / CARD)
    with pytest.raises(UserError, match=f"{CARD}: is a pipe or a device"):
        write_cards(run)


def test_roles_of_ppo(run: Path):
    roles = {"actor_model_name_or_path": "/tmp/x/sft", "critic_model_name_or_path": "a/reward"}
    describe(run, "ppo", **roles)
    (run / "config.json").unlink()
    (run / "adapter" / "adapter_config.json").unlink()
    model(run / "actor")
    model(run / "critic")
    (run / "actor_ema").mkdir()
    (run / "actor_ema" / "config.json").write_text("{}")  # no weights: not complete
    assert write_cards(run) == [run / "actor" / CARD, run / "critic" / CARD]
    assert "base_model" not in fields_of(run / "actor")  # a path of this machine
    assert fields_of(run / "critic")["pipeline_tag"] == "text-classification"
    assert "actor, on `sft`" in (run / "actor" / CARD).read_text()


def test_names_cannot_break_the_page(run: Path):
    describe(run, "sft", model_name_or_path=f"`{EVIL}", data_path=[f"{EVIL}`\n# title"])
    write_lines(run / "metrics.jsonl", [{"kind": "eval", "step": 0, "rewards/a|b": 1.0}])
    write_cards(run)
    text = (run / CARD).read_text()
    assert "\n# title" not in text and "\x1b" not in text and "\u202e" not in text
    assert r"| rewards/a\|b | 1 | 1 |" in text
    assert "\n~~~\n\n</details>" in text


def test_a_run_writes_its_cards_at_its_end(run: Path, capsys):
    (run / "metrics.jsonl").unlink()
    log = MetricLogger(LogConfig(), run, 0)
    log.log(1, {"loss": 2.0}, kind="eval")
    assert not (run / CARD).exists()
    log.close()
    assert (run / CARD).exists()
    assert capsys.readouterr().out.startswith("curves, warnings and answers: ")
