"""The line at the start of a run, and the runs that it refuses."""

from types import SimpleNamespace

import pytest
import torch

from dschat.config import SFTSettings
from dschat.errors import UserError
from dschat.plan import line, start
from dschat.plan.roles import CONTEXT, GIB
from dschat.utils.distributed import Distributed
from tests.helpers.tiny import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def settings(folder: str, **flags: object) -> SFTSettings:
    return SFTSettings.of(
        model_name_or_path=folder, max_seq_len=32, per_device_train_batch_size=8, **flags
    )


def test_what_fits_is_one_line_and_what_does_not_is_refused_unless_told(folder):
    told = line.line_of(settings(folder), "fp32", 1, 2 * GIB)
    assert told.startswith("plan: 0.8 of 2.0 GiB, 1.2 spare; most in training")
    with pytest.raises(UserError, match=r"plan: 0.8 of 0.0 GiB.*more or larger GPUs.*ignore_plan"):
        line.line_of(settings(folder), "fp32", 1, GIB / 100)
    told = line.line_of(settings(folder, ignore_plan=True), "fp32", 1, GIB / 100)
    assert told.endswith("ignore_plan: it starts all the same")


def test_it_names_the_change_that_makes_it_fit(folder):
    flags = {"per_device_train_batch_size": 4096, "gradient_checkpointing": True}
    big = SFTSettings.of(model_name_or_path=folder, max_seq_len=32, **flags)
    needed = line.plan_memory(big, line.configs_of(big), "fp32", 1).total
    with pytest.raises(UserError, match="it fits with --per_device_train_batch_size 2048 --grad"):
        line.line_of(big, "fp32", 1, CONTEXT + 0.8 * (needed - CONTEXT))


def test_a_model_that_cannot_be_planned_is_said_and_starts(folder, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("no fake kernel")

    monkeypatch.setattr(line, "plan_memory", broken)
    told = line.line_of(settings(folder), "fp32", 1, GIB)
    assert told == "plan: none for this model (RuntimeError: no fake kernel)"


def test_a_cpu_has_no_line(folder, monkeypatch):
    monkeypatch.setattr(line, "line_of", lambda *_: pytest.fail("planned"))
    start.tell_plan(Distributed(0, 1, 0, torch.device("cpu")), settings(folder))


def test_rank_0_plans_with_the_memory_of_its_gpu(folder, monkeypatch, capsys):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=3 * GIB)
    )
    ctx = SimpleNamespace(device=torch.device("cuda", 0), dtype_name="fp32", world_size=1)
    start.tell_plan(ctx, settings(folder))
    assert capsys.readouterr().out.startswith("plan: 0.8 of 3.0 GiB")
