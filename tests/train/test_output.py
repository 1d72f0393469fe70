"""Output folders: what a run may replace, and the room on the disk that it asks for."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.errors import UserError
from dschat.models.save_plan import MERGED, SavePlan
from dschat.train import run_lock
from dschat.train.adapter_ranks import beyond_rank, fitting_dim
from dschat.train.disk import ModelSize, Written, check_disk, in_words
from dschat.train.model_config import ModelConfig
from dschat.train.run_config import RunConfig
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.adapter_write import AdapterOrigin
from dschat.utils.module.lora import LoraConfig
from tests.helpers.tiny import save_llama_folder, tiny_llama

GB = 10**9
Usage = namedtuple("Usage", "total used free")


def engine(dtype: str = "fp32", zero_stage: int = 0) -> EngineConfig:
    return EngineConfig(zero_stage=zero_stage, micro_batch_size=1, dtype=dtype)


@pytest.fixture(autouse=True)
def released():
    """What a run holds until its end, no test keeps."""
    yield
    run_lock.release()


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """An output folder that holds a model."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    return tmp_path / "out"


def test_every_step_has_a_folder_of_its_own():
    one = [cls.of(model_name_or_path="m") for cls in (SFTSettings, RewardSettings, DPOSettings)]
    three = RLHFSettings.of(actor_model_name_or_path="m", critic_model_name_or_path="m")
    folders = [settings.run.output_dir for settings in (*one, three)]
    assert folders == ["./output/sft", "./output/reward", "./output/dpo", "./output/ppo"]


def test_a_finished_model_is_not_replaced(finished: Path):
    with pytest.raises(UserError) as error:
        RunConfig.of(output_dir=str(finished)).check_output()
    assert str(error.value) == (
        f"output_dir {finished}: {finished} holds a finished model; give another output_dir, or "
        "overwrite_output_dir to replace it"
    )
    RunConfig.of(output_dir=str(finished), overwrite_output_dir=True).check_output()
    RunConfig.of(output_dir=str(finished.parent / "other")).check_output()
    run_lock.release()
    assert [path.name for path in finished.iterdir()] == ["config.json"]


def test_an_adapter_and_the_roles_of_step_3_count_as_well(finished: Path):
    run = RunConfig.of(output_dir=str(finished.parent))
    run.check_output("actor", "critic")
    finished.rename(finished.with_name("critic"))
    with pytest.raises(UserError, match="critic holds a finished model"):
        run.check_output("actor", "critic")
    (finished.with_name("critic") / "config.json").rename(finished.parent / "adapter_config.json")
    with pytest.raises(UserError, match="holds a finished model"):
        run.check_output()


def test_a_run_may_replace_what_it_continues(finished: Path):
    resume = RunConfig.of(output_dir=str(finished), resume="newest")
    with pytest.raises(UserError, match="holds a finished model"):
        resume.check_output()  # there is nothing to continue
    step = finished / "checkpoints" / "step-000004"
    step.mkdir(parents=True)
    resume.check_output()
    RunConfig.of(output_dir=str(finished), resume=str(step)).check_output()
    with pytest.raises(UserError, match="holds a finished model"):
        RunConfig.of(output_dir=str(finished)).check_output()
    fork = finished.with_name("fork")
    shutil.copytree(finished, fork, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(UserError, match="fork holds a finished model"):
        RunConfig.of(output_dir=str(fork), resume=str(step)).check_output()


def test_checkpoints_that_a_killed_save_moved_aside_are_found_first(finished: Path):
    """Saving replaces the folder by renames; a run that died between them can go on."""
    aside = finished.with_name(".out.0123abcd.old") / "checkpoints" / "step-000004"
    aside.mkdir(parents=True)
    RunConfig.of(output_dir=str(finished), resume="newest").check_output()
    assert (finished / "checkpoints" / "step-000004").is_dir()


def test_events_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        flags = {"enable_tensorboard": True, "tensorboard_path": str(path)}
        with pytest.raises(UserError, match=f"tensorboard_path {path}: .*; give a writable"):
            RunConfig.of(output_dir=str(tmp_path / "out"), **flags).check_output()


def test_bytes_by_hand():
    """100 parameters, adapters of 10, which train."""
    size, origin = ModelSize(base=100, adapters=10, trained=10), AdapterOrigin("b", LoraConfig(), 8)
    both, adapter = SavePlan(adapter=origin), SavePlan(merged=False, adapter=origin)
    assert Written.of(size, engine(), MERGED) == Written(400, 120)
    assert Written.of(size, engine(), both) == Written(440, 120)
    assert Written.of(size, engine("bf16"), adapter) == Written(20, 140)
    assert Written.of(size, engine(zero_stage=2), MERGED).checkpoint == 160
    assert Written.of(size, engine(), both, averaged=True) == Written(880, 160)


@pytest.mark.parametrize("lora_dim", [0, 2])
def test_sizes_are_counted_without_weights(tmp_path: Path, lora_dim: int):
    save_llama_folder(tmp_path)
    model = ModelConfig(lora=LoraConfig(lora_dim=lora_dim))
    size = model.check(str(tmp_path), lambda config: tiny_llama())
    live = tiny_llama()
    base = sum(p.numel() for p in live.parameters())
    trained = sum(p.numel() for p in model.apply(live).parameters() if p.requires_grad)
    assert (size.base, size.trained) == (base, trained)
    assert size.adapters == (trained if lora_dim else 0)


def test_a_rank_above_that_of_every_layer(tmp_path: Path):
    save_llama_folder(tmp_path)
    linear = [m for n, m in tiny_llama().named_modules() if isinstance(m, nn.Linear)]
    widest = max(min(module.weight.shape) for module in linear)

    def check(lora_dim: int) -> None:
        model = ModelConfig(lora=LoraConfig(lora_dim=lora_dim))
        model.check(str(tmp_path), lambda config: tiny_llama())

    check(widest)
    with pytest.raises(UserError, match=f"lora_dim {widest + 1}: no adapted layer has a rank"):
        check(widest + 1)


def test_a_rank_above_that_of_some_layers_is_said(tmp_path: Path, capsys):
    """Width 32, two heads of 8 for keys and values; 2 layers of 7 matrices."""
    save_llama_folder(tmp_path)

    def said(lora_dim: int, *names: str) -> str:
        lora = LoraConfig(lora_dim=lora_dim, lora_module_name=names or ("all-linear",))
        ModelConfig(lora=lora).check(str(tmp_path), lambda config: tiny_llama())
        return capsys.readouterr().out

    assert said(16) == "" == said(32, "q_proj", "mlp")
    assert said(17) == (
        f"advice: {tmp_path}: lora_dim 17 is above the rank of 4 of 14 adapted layers "
        "(self_attn.k_proj, self_attn.v_proj: 16), where the rest of it adds nothing: "
        "give at most 16\n"
    )


def test_every_lower_rank_is_named_with_its_layers():
    shapes = {"a.v": (16, 64), "a.k": (16, 64), "a.q": (64, 64), "b.q": (64, 64)}
    sizes = {name: torch.Size(shape) for name, shape in shapes.items()}
    line = beyond_rank("m", sizes, 32)
    assert line is not None
    assert "m: lora_dim 32 is above the rank of 2 of 4 adapted layers (a.v, a.k: 16)" in line
    assert line.startswith("advice: ") and line.endswith("give at most 16")
    assert beyond_rank("m", sizes, 8) is None and fitting_dim(sizes, 8) == 8


def test_small_layers_do_not_decide_a_rank():
    """Routers of 2 and of 8 experts hold 64 * 10 of 64 * (10 + 64 + 2 * 640) weights, 0.7 %."""
    shapes = {"l.0.mlp.gate.weight": (2, 64), "l.1.mlp.gate.weight": (8, 64), "q": (64, 64)}
    sizes = {name: torch.Size(shape) for name, shape in (shapes | {"up": (2, 640, 64)}).items()}
    line = beyond_rank("m", sizes, 32)
    assert line is not None and fitting_dim(sizes, 32) == 32
    assert "2 of 4 adapted layers (mlp.gate: 2; mlp.gate: 8)" in line
    assert not line.startswith("advice") and "at most" not in line
    assert fitting_dim(sizes, 100) == 64  # q and the routers hold 5 %


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 * GB, 5 * GB, 5 * GB))
    models, folder = [Written(GB, 2 * GB), Written(GB, 0)], tmp_path / "not" / "there"
    check_disk(str(folder), models, checkpoints=1)
    with pytest.raises(UserError) as error:
        check_disk(str(folder), models, checkpoints=2)
    assert str(error.value) == (
        f"output_dir {folder}: the run will write 6 GB (2 GB of model folders and 4 GB of 2 "
        "checkpoints), and 5 GB are free on that disk; free some, or give an output_dir on "
        "another disk"
    )


def test_as_many_checkpoints_as_there_will_be_at_a_time(tmp_path: Path, monkeypatch):
    asked = []
    monkeypatch.setattr("dschat.train.disk.check_disk", lambda *args: asked.append(args[2]))

    def checkpoints(total_steps: int, **flags: int) -> int:
        RunConfig.of(output_dir=str(tmp_path), **flags).check_disk([], total_steps)
        return asked[-1]

    assert checkpoints(100) == 0
    assert checkpoints(100, save_steps=200) == 0
    assert checkpoints(100, save_steps=60) == 1
    assert checkpoints(100, save_steps=10) == 2  # one, and the next while it is written
    assert checkpoints(100, save_steps=10, save_total_limit=3) == 4
    (tmp_path / "checkpoints" / "step-000010").mkdir(parents=True)
    assert checkpoints(100, save_steps=10) == 1


def test_bytes_in_words():
    words = [in_words(size) for size in (0, 999, 12_345, 2.5e9)]
    assert words == ["0 bytes", "999 bytes", "12.3 kB", "2.5 GB"]
