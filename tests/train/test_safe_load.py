"""Checkpoint files cannot run code."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dschat.errors import UserError
from dschat.train.safe_load import load_file, make_loading_safe


class Payload:
    """Pickled, a call of os.system."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A file that is there once a payload has run."""
    return tmp_path / "ran"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_is_refused_and_does_not_run(tmp_path: Path, trap: Path, zipped: bool):
    path = tmp_path / "mp_rank_00_model_states.pt"
    state = {"module": {"w": torch.ones(2)}, "lr_scheduler": Payload(f"touch {trap}")}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"model_states\.pt: refused, it holds more than tensors"):
        load_file(str(path))
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # so the payload was a real one


def test_the_engine_reads_by_it(tmp_path: Path, trap: Path):
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    engine = SimpleNamespace(checkpoint_engine=TorchCheckpointEngine())
    path = tmp_path / "optim_states.pt"
    path.write_bytes(pickle.dumps(Payload(f"touch {trap}"), protocol=2))
    make_loading_safe(engine)  # type: ignore[arg-type]
    with pytest.raises(UserError):
        engine.checkpoint_engine.load(str(path), map_location=lambda storage, place: storage)
    assert not trap.exists()


def test_deepspeeds_own_records_pass(tmp_path: Path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    dynamic = DynamicLossScaler(8.0, 5, 1.0, 1, False, dtype=torch.float16)
    state = {
        "loss_scaler": dynamic,
        "static": LossScaler(1),
        "zero_stage": ZeroStageEnum(2),
        "param_slice_mappings": {"w": fragment_address(numel=3, start=1)},
    }
    torch.save(state, tmp_path / "s.pt")
    loaded = load_file(str(tmp_path / "s.pt"))
    assert loaded["loss_scaler"].cur_scale == 8.0
    assert loaded["zero_stage"] is ZeroStageEnum(2)
    assert loaded["param_slice_mappings"]["w"] == fragment_address(3, 1)


class ByAttribute:
    """Pickled, the attribute of an object: the way of enumerations in Python 3.11.0 to 3.11.3."""

    def __init__(self, owner: object, name: str):
        self.found = owner, name

    def __reduce__(self):
        return getattr, self.found


def test_a_stage_by_getattr_is_read_and_nothing_else(tmp_path: Path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save({"zero_stage": ByAttribute(ZeroStageEnum, "gradients")}, tmp_path / "s.pt")
    assert load_file(str(tmp_path / "s.pt"))["zero_stage"] is ZeroStageEnum.gradients
    for owner, name in ((LossScaler, "backward"), (ZeroStageEnum, "__class__")):
        torch.save({"zero_stage": ByAttribute(owner, name)}, tmp_path / "s.pt")
        with pytest.raises(UserError, match="refused"):
            load_file(str(tmp_path / "s.pt"))


@pytest.mark.parametrize("size", [0, 10, 300])
def test_a_damaged_file_is_one_line_with_its_name(tmp_path: Path, size: int):
    path = tmp_path / "ema.pt"
    torch.save({"w": torch.ones(50)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"ema\.pt: .*resume from another"):
        load_file(str(path))
