"""What cannot be read or saved is refused in one line that names value, place and remedy."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dschat.errors import UserError
from dschat.models.causal_lm import check_context, create_hf_model, load_config
from dschat.models.reward_head import check_reward_head
from dschat.models.reward_model import create_critic_model
from dschat.models.save import save_hf_format
from dschat.models.save_plan import MERGED, plan_saving
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.utils.module import adapter_config
from dschat.utils.module import model_source as source
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.model_source import resolve_model
from tests.helpers import tiny
from tests.helpers.adapters import ALONE, plan, save_base, with_adapter

LORA = LoraConfig(lora_dim=2, lora_module_name=("q_proj",))
PREFIX = "base_model.model.model.layers.0.self_attn"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter of a language model and one of a reward model."""
    folder = tmp_path_factory.mktemp("models")
    base = save_base(folder / "base", "llama")
    tokenizer = tiny.byte_tokenizer()
    model = with_adapter(create_hf_model(base, tokenizer, torch.float32), LORA)
    reward = create_critic_model(base, tokenizer, torch.float32, init_head=True)
    out = folder / "adapter"
    save_hf_format(model, tokenizer, out, ALONE, plan("adapter", base, LORA, out))
    out = folder / "reward"
    save_hf_format(
        with_adapter(reward, LORA), tokenizer, out, ALONE, plan("adapter", base, LORA, out)
    )
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A copy of the language model's adapter, to be spoilt."""
    return Path(shutil.copytree(models / "adapter", tmp_path / "adapter"))


def set_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path) | changes
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)


def load_model(folder: Path) -> torch.nn.Module:
    return create_hf_model(str(folder), tiny.byte_tokenizer(), torch.float32)


def assert_one_line(call, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("peft_type", "LOHA", "peft_type is 'LOHA', only LORA can be read"),
        ("task_type", "TOKEN_CLS", "task_type is 'TOKEN_CLS'; give one of CAUSAL_LM or of SEQ_CLS"),
        ("base_model_name_or_path", None, "names no base; set base_model_name_or_path"),
        ("bias", "all", "it trained biases of the base"),
        ("lora_bias", True, "B has a bias"),
        ("layer_replication", [[0, 2], [1, 2]], "it repeats layers of the base"),
        ("alora_invocation_tokens", [3], "it is on after certain tokens only"),
        ("use_qalora", True, "it pools the input of A"),
        ("use_bdlora", {"nblocks": 2}, "its matrices are block-diagonal"),
        ("megatron_config", {"tp": 2}, "it is for layers split among devices"),
        ("revision", "v2", "only the default revision is read"),
        ("kasa_config", {"beta": 1}, "this option is not supported here"),
        ("of_a_later_year", 1, "this option is not supported here"),
        *[
            ("init_lora_weights", start, f"init_lora_weights {start!r} changes the base's weights")
            for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
        ],
        ("lora_alpha", "much", "adapter_config.json is malformed"),
        ("lora_alpha", 0, "malformed (lora_alpha is 0.0: give a number above 0); save"),
        ("r", 0, "malformed (r is 0)"),
        ("r", 4.5, "malformed (lora_dim is 4.5: give a whole number)"),
        ("rank_pattern", {"q_proj": "x"}, "malformed (lora_dim is 'x': give 0 or more)"),
        ("alpha_pattern", {"q_proj": float("inf")}, "malformed (lora_alpha is inf: give a number"),
        ("rank_pattern", {"(q": 2}, "malformed ('(q' is no pattern of names: missing ), un"),
        ("rank_pattern", {"q{1,99999999999}": 2}, "is no pattern of names: the repetition numb"),
        ("alpha_pattern", {"(" * 9999 + ")" * 9999: 2}, "is no pattern of names: maximum recurs"),
        ("base_model_name_or_path", ["base"], "names no base; set base_model_name_or_path in"),
        ("use_rslora", "no", "malformed (use_rslora is no: give True or False)"),
    ],
)
def test_configs_that_mean_something_else(folder: Path, key: str, value: object, reason: str):
    set_config(folder, **{key: value})
    for check in (load_config, load_hf_tokenizer, check_reward_head):  # before weights are read
        assert_one_line(lambda check=check: check(str(folder)), str(folder), reason)


def test_a_key_that_stands_twice(folder: Path):
    """A reader would take its last value."""
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace("{", '{"r": 8,', 1))
    reason = "cannot be read (the key 'r' stands twice)"
    assert_one_line(lambda: load_config(str(folder)), str(folder), reason)


def test_a_config_nested_without_end(folder: Path):
    (folder / "adapter_config.json").write_text('{"r": ' + "[" * 100_000)
    assert_one_line(lambda: load_config(str(folder)), str(folder), "cannot be read (not a JSON ob")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_backtracks_without_end(folder: Path, monkeypatch, key: str):
    monkeypatch.setattr(adapter_config, "_SECONDS", 0.2)
    set_config(folder, **{key: {r"(([a-z._0-9])+)+!": 2}})
    reason = "rank_pattern or alpha_pattern of adapter_config.json does not come to an end for "
    assert_one_line(lambda: load_model(folder), str(folder), reason, "write simpler ones")


def test_starts_that_leave_the_base_alone_are_read(folder: Path):
    for start in (True, False, "gaussian", "orthogonal", "eva", "mica"):
        set_config(folder, init_lora_weights=start)
        assert resolve_model(str(folder)).adapters


A, B = f"{PREFIX}.q_proj.lora_A.weight", f"{PREFIX}.q_proj.lora_B.weight"
NORM = "base_model.model.model.norm.weight"


@pytest.mark.parametrize(
    ("changes", "config", "reason"),
    [
        ({B: None}, {}, f"missing {B.removeprefix('base_model.model.').removesuffix('.weight')}"),
        ({"other.q_proj.lora_A.weight": torch.ones(2, 32)}, {}, "unexpected other.q_proj.lora_A"),
        ({f"{PREFIX}.q_proj.lora_C.weight": torch.ones(2)}, {}, "unexpected base_model.model."),
        ({f"{PREFIX}.x.lora_A.weight": torch.ones(2, 32)}, {}, "layers.0.self_attn.x.lora_B"),
        ({f"{PREFIX}.q_proj.lora_magnitude_vector": torch.ones(32)}, {}, "unexpected model.layers"),
        ({}, {"use_dora": True}, "missing model.layers.0.self_attn.q_proj.magnitude"),
        ({A: torch.ones(2, 31)}, {}, "q_proj does not fit (32, 32)"),
        ({B: torch.ones(31, 2)}, {}, "q_proj does not fit (32, 32)"),
        ({}, {"r": 4}, "q_proj of rank 2, adapter_config.json says 4"),
        (
            {A.replace("self_attn.q_proj", "odd"): torch.ones(2, 32)}
            | {B.replace("self_attn.q_proj", "odd"): torch.ones(32, 2)},
            {},
            "no layer model.layers.0.odd to adapt",
        ),
        ({"base_model.model.odd.weight": torch.ones(3)}, {}, "unexpected odd.weight"),
        ({NORM: torch.ones(31)}, {}, "model.norm.weight (31,) does not fit (32,)"),
        ({}, {"modules_to_save": ["norm"]}, "missing model.norm.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, changes: dict, config: dict, reason: str):
    set_tensors(folder, changes)
    set_config(folder, **config)
    assert_one_line(lambda: load_model(folder), f"adapter {folder}: ", reason)


def test_files_that_cannot_be_read(folder: Path, models: Path):
    def resolve() -> source.ModelSource:
        return resolve_model(str(folder))

    (folder / "adapter_config.json").write_text("{")
    assert_one_line(resolve, "adapter_config.json cannot be read (not a JSON object)")
    (folder / "adapter_config.json").write_text("[]")
    assert_one_line(resolve, "adapter_config.json cannot be read (not a JSON object)")
    shutil.copy(models / "adapter/adapter_config.json", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    assert_one_line(lambda: resolve().read_adapters(), "adapter_model.safetensors cannot be read")
    (folder / "adapter_model.safetensors").unlink()
    assert_one_line(resolve, "holds no adapter_model.safetensors; copy the complete folder")
    (folder / "adapter_model.bin").write_bytes(b"half")
    assert_one_line(lambda: resolve().read_adapters(), "adapter_model.bin cannot be read")
    (folder / "model.safetensors").write_bytes(b"")
    assert_one_line(resolve, "holds both adapter_config.json and model.safetensors; move one")


def test_bases_that_are_not_there(folder: Path, tmp_path: Path):
    gone = tmp_path / "gone"
    set_config(folder, base_model_name_or_path=str(gone))
    words = f"adapter {folder}: its base {gone} is not there; put it back, or set base_model"
    for check in (load_config, load_hf_tokenizer, check_reward_head):
        assert_one_line(lambda check=check: check(str(folder)), words, "adapter_config.json")
    assert_one_line(lambda: check_context(str(folder), 9, "max_seq_len"), words)
    gone.mkdir()
    words = f"model {gone} (the base of {folder}): no readable config.json"
    assert_one_line(lambda: load_config(str(folder)), words, "put it back, or set base_model")


def test_bases_in_a_circle(folder: Path, models: Path, tmp_path: Path):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    set_config(folder, base_model_name_or_path=str(other))
    assert [a.folder for a in resolve_model(str(folder)).adapters] == [other, folder]
    assert resolve_model(str(folder)).base == str(models / "base")
    set_config(other, base_model_name_or_path=str(folder))
    circle = f"its bases go in a circle ({folder} → {other} → {folder})"
    assert_one_line(lambda: resolve_model(str(folder)), circle)


def test_adapters_of_the_other_kind_of_model(models: Path):
    tokenizer, reward = tiny.byte_tokenizer(), str(models / "reward")
    words = f"adapter {reward}: is a reward model's (SEQ_CLS); give a language"
    assert_one_line(lambda: load_model(models / "reward"), words)
    check_reward_head(reward)
    for check in (
        lambda: check_reward_head(str(models / "adapter")),
        lambda: create_critic_model(str(models / "adapter"), tokenizer, torch.float32),
    ):
        assert_one_line(check, "no score.weight or v_head.weight in it; train one with step 2")


def test_tokenizer_is_the_adapters_own_or_its_bases(folder: Path, models: Path):
    own = load_hf_tokenizer(str(folder), add_eot_token=True, eot_token="<end>")
    own.save_pretrained(folder)
    assert load_hf_tokenizer(str(folder)).eos_token == "<end>"
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert load_hf_tokenizer(str(folder)).eos_token == "</s>"
    assert load_config(str(folder)).vocab_size == tiny.VOCABULARY


def test_adapter_on_the_hub(folder: Path, monkeypatch):
    """Found by its config; a name without one is a model as before."""
    requests = []

    def cached(name: str, file: str) -> str | None:
        here = {("whole/cached", "config.json"), ("adapter/cached", "adapter_config.json")}
        return str(folder / file) if (name, file) in here else None

    def download(name: str, file: str) -> str:
        requests.append(name)
        if name != "some/adapter":
            raise FileNotFoundError(name)
        return str(folder / file)

    monkeypatch.setattr(source, "try_to_load_from_cache", cached)
    monkeypatch.setattr(source, "hf_hub_download", download)
    monkeypatch.setattr(source, "snapshot_download", lambda name, **_: str(folder))
    monkeypatch.setattr(source, "_hub_adapter", functools.cache(source._hub_adapter.__wrapped__))
    for name in ("some/adapter", "adapter/cached"):
        parts = resolve_model(name)
        assert [(a.name, a.folder) for a in parts.adapters] == [(name, folder)]
    for name in ("some/model", "whole/cached"):
        assert resolve_model(name) == source.ModelSource(name, name)
    assert requests == ["some/adapter", "some/model"]
    model = create_hf_model("some/adapter", load_hf_tokenizer("some/adapter"), torch.float32)
    assert torch.equal(model.lm_head.weight, load_model(folder).lm_head.weight)


def plan_of(mode: str, name: object, output: Path, lora=LORA, train_base: bool = False):
    return plan_saving(mode, str(name), lora, train_base=train_base, output_dirs=[output])


def test_what_is_saved_is_decided_before_work(models: Path, tmp_path: Path, capsys):
    base, out = models / "base", tmp_path / "out"
    both = plan_of("both", base, out)
    assert both.merged and both.adapter.base == str(base)
    assert both.adapter.vocabulary == tiny.VOCABULARY
    assert not plan_of("adapter", base, out).merged
    assert plan_of("merged", base, out) == MERGED
    assert plan_of("both", base, out, lora=LoraConfig()) == MERGED
    assert plan_saving("adapter", str(base), LORA, train_base=True, output_dirs=[]) == MERGED
    assert capsys.readouterr().out == ""
    assert plan_of("adapter", base, out, lora=LoraConfig()) == MERGED
    assert "trains without LoRA: all of it will be saved" in capsys.readouterr().out


def test_adapters_that_could_not_be_loaded_again_are_not_saved(
    models: Path, tmp_path: Path, capsys
):
    base, chained, out = models / "base", models / "adapter", tmp_path / "out"
    cases = [
        (
            base,
            out,
            {"train_base": True},
            "train_base_model changes the base",
            "lora_save merged",
        ),
        (chained, out, {}, f"{chained} is an adapter itself", f"python -m dschat.merge {chained}"),
        (base, base, {}, f"takes the place of its base {base}", "give another output_dir"),
    ]
    for name, output, options, reason, remedy in cases:
        assert_one_line(
            lambda a=(name, output), o=options: plan_of("adapter", *a, **o),
            *("lora_save adapter: ", reason, remedy),
        )
        assert plan_of("both", name, output, **options) == MERGED
        assert re.search(f"only the merged model .*{re.escape(reason)}", capsys.readouterr().out)


def test_adapter_that_training_starts_from_is_not_replaced(models: Path, tmp_path: Path):
    inside = Path(shutil.copytree(models / "adapter", tmp_path / "out/adapter"))
    for mode in ("both", "merged", "adapter"):
        assert_one_line(
            lambda m=mode: plan_of(m, inside, tmp_path / "out"),
            *(f"output_dir {tmp_path / 'out'}: its folder 'adapter' is what", "give another"),
        )
