"""The Python examples of the pages run as they stand, on a tiny model."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[2]


def test_lora_plus_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (ROOT / "docs/lora_plus.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    model = tiny_llama()
    ids = torch.arange(3, 9).unsqueeze(0)
    expected = model(ids).logits
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example, names)
    rates = {group["name"]: group["lr"] for group in names["optimizer"].param_groups}
    assert rates == pytest.approx({"lora_A": 5e-5, "lora_B": 8e-4})
    monkeypatch.undo()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # B starts at zero, and nothing trained: the model is what it was.
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=0)
