"""`python -m dschat.merge`: an adapter's folder in, a plain model folder out."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from dschat import merge
from dschat.errors import UserError
from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers.adapters import (
    ALONE,
    assert_equal,
    logits_of,
    plan,
    save_base,
    scores_of,
    with_adapter,
)
from tests.helpers.tiny import byte_tokenizer

LORA = LoraConfig(lora_dim=4, lora_alpha=6.0, use_dora=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and on it `adapter` and `reward`; `bf16` and on it `bf16-adapter`."""
    folder, tokenizer = tmp_path_factory.mktemp("made"), byte_tokenizer()
    base = save_base(folder / "base", "llama")
    model = with_adapter(create_hf_model(base, tokenizer, torch.float32), LORA)
    reward = create_critic_model(base, tokenizer, torch.float32, init_head=True)
    small = create_hf_model(base, tokenizer, torch.bfloat16)
    save_hf_format(small, tokenizer, folder / "bf16", ALONE)
    bases = {"adapter": (model, base), "reward": (with_adapter(reward, LORA), base)}
    bases["bf16-adapter"] = (with_adapter(small, LORA), str(folder / "bf16"))
    for name, (module, its_base) in bases.items():
        out = folder / name
        save_hf_format(module, tokenizer, out, ALONE, plan("adapter", its_base, LORA, out))
    torch.save(
        {"logits": logits_of(model), "scores": scores_of(reward.eval())}, folder / "expected"
    )
    return folder


def expected(made: Path, what: str) -> torch.Tensor:
    return torch.load(made / "expected")[what]


def run_module(monkeypatch, *words: object) -> None:
    """As `python -m dschat.merge` with these words."""
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, words)])
    monkeypatch.delitem(sys.modules, "dschat.merge", raising=False)
    runpy.run_module("dschat.merge", run_name="__main__")


def test_language_model_from_the_command_line(made: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "deep/merged"
    run_module(monkeypatch, made / "adapter", out)
    assert capsys.readouterr().out == f"{made / 'adapter'} merged into {out}\n"
    assert_equal(logits_of(AutoModelForCausalLM.from_pretrained(out)), expected(made, "logits"))
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert not (out / "adapter_config.json").exists()
    with pytest.raises(SystemExit, match="2"):
        run_module(monkeypatch, out, tmp_path / "x")
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.splitlines()[-1].startswith(f"error: {out}: is no adapter")


def test_reward_model_with_its_head(made: Path, tmp_path: Path):
    merge.main([str(made / "reward"), str(tmp_path / "merged")])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert theirs.config.num_labels == 1
    assert_equal(logits_of(theirs)[:, 0], expected(made, "scores"))


def test_without_a_task_the_head_decides(made: Path, tmp_path: Path):
    for name, kind in (
        ("reward", "LlamaForSequenceClassification"),
        ("adapter", "LlamaForCausalLM"),
    ):
        folder = Path(shutil.copytree(made / name, tmp_path / name))
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
        merge.main([str(folder), str(tmp_path / name / "merged")])
        written = json.loads((tmp_path / name / "merged/config.json").read_text())
        assert written["architectures"] == [kind]


@pytest.mark.parametrize(
    ("name", "given", "dtype"),
    [
        ("adapter", "auto", "float32"),
        ("bf16-adapter", "auto", "bfloat16"),
        ("adapter", "bf16", "bfloat16"),
        ("adapter", "fp16", "float16"),
        ("bf16-adapter", "fp32", "float32"),
    ],
)
def test_dtype_is_the_bases_own_or_the_one_given(made, tmp_path, name, given, dtype):
    merge.main([str(made / name), str(tmp_path / "merged"), "--dtype", given])
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == dtype
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {str(p.dtype) for p in loaded.parameters()} == {f"torch.{dtype}"}


def test_a_finished_model_is_not_replaced(made: Path, tmp_path: Path):
    words = [str(made / "adapter"), str(tmp_path / "merged")]
    merge.main(words)
    (tmp_path / "merged" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"merged: holds a finished model; give another, or --over"):
        merge.main(words)
    assert (tmp_path / "merged" / "config.json").read_text() == "{}"
    merge.main([*words, "--overwrite_output_dir"])
    assert (tmp_path / "merged" / "config.json").read_text() != "{}"


def test_bad_input_is_one_line_and_changes_nothing(made: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    for name in ("adapter", "reward"):
        path = copy / name / "adapter_config.json"
        path.write_text(path.read_text().replace(str(made), str(copy)))
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    (tmp_path / "file").write_text("")
    adapter, apart = str(copy / "adapter"), "holds .*, which the merge reads; give another"
    cases = [
        ([str(copy / "base"), "x"], "base: is no adapter .*give the folder or hub id of one"),
        ([str(copy / "none"), "x"], "none: is no adapter"),
        ([adapter, str(tmp_path / "file")], "file: is a file; give a folder"),
        ([adapter, adapter], f"adapter: {apart}"),
        ([adapter, str(copy / "base")], f"base: {apart}"),
        ([adapter, str(copy)], f"copy: {apart}"),
        ([adapter], "the following arguments are required: output_dir"),
        ([adapter, str(tmp_path / "x"), "--dtype", "int8"], "invalid choice: 'int8'"),
        ([adapter, str(tmp_path / "x"), "--dtyp", "fp32"], "unrecognized arguments: --dtyp fp32"),
    ]
    for argv, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            merge.main(argv)
        assert "\n" not in str(caught.value)
    shutil.rmtree(copy / "base")
    with pytest.raises(UserError, match=r"its base .*base is not there; put it back, or set base"):
        merge.main([adapter, str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
    after = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert after == {p: data for p, data in before.items() if copy / "base" not in p.parents}
