"""The doctor: each finding is ok or says what to do, and something to do is exit code 1."""

from importlib import metadata
from types import SimpleNamespace

import pytest

from dschat.command import doctor, training_check
from dschat.command.doctor import Finding
from dschat.errors import UserError


def test_a_finding_fits_the_window_and_cannot_steer_it():
    assert Finding("python", "3.11").lines(80) == ["ok     python: 3.11"]
    lines = Finding("disk", "1 GB free \x1b[2J" + "x " * 30, "free some").lines(40)
    assert lines[0].startswith("to do  disk: 1 GB free \\x1b[2J") and "free some" in lines[-1]
    assert all(len(line) <= 40 for line in lines) and all(x[:7] == " " * 7 for x in lines[1:])


def test_versions_are_held_against_what_the_package_declares(monkeypatch):
    declared = ["torch>=2.13,<3", "tqdm>=4.66", "nothing-there>=1", 'wandb>=1; extra == "wandb"']
    present = {"torch": "2.4.0", "tqdm": "4.70"}

    def version(name: str) -> str:
        if name not in present:
            raise metadata.PackageNotFoundError(name)
        return present[name]

    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    monkeypatch.setattr(metadata, "version", version)
    _, torch, missing, fitting = doctor.versions()
    assert torch.found == "2.4.0, tested with <3,>=2.13"
    assert torch.remedy == 'run: pip install "torch<3,>=2.13"'
    assert missing.found == "missing, tested with >=1" and fitting.found == "tqdm 4.70"
    assert fitting.remedy is None


def test_gpus_and_one_that_torch_misses(monkeypatch):
    (none,) = doctor.gpus()
    assert none.found == "none; training runs on the CPU" and none.remedy is None
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    (missed,) = doctor.gpus()
    assert "nvidia-smi is there, and torch" in missed.found and "install" in missed.remedy
    card = SimpleNamespace(name="H200", total_memory=140 * 10**9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: card)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    assert [f.found for f in doctor.gpus()] == ["H200, 140 GB, bf16"] * 2


@pytest.mark.parametrize("problem", [None, "ncclSystemError"])
def test_nccl_is_a_sum_over_all_gpus(problem, monkeypatch):
    (unneeded,) = doctor.nccl()
    assert unneeded.found == "not needed without a GPU"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 27, 3))
    monkeypatch.setattr(training_check, "sum_over_gpus", lambda count: problem)
    (finding,) = doctor.nccl()
    assert finding.found == f"2.27.3, a sum over 2: {problem or 'right'}"
    assert (finding.remedy is None) == (problem is None)


def test_a_disk_without_room(monkeypatch):
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: 10**9)
    findings = [*doctor.disks()]
    assert len(findings) == 3 and all(f.found == "1 GB free" and f.remedy for f in findings)


def test_folders_that_cannot_be_written_to(monkeypatch):
    monkeypatch.setattr("os.access", lambda folder, mode: False)
    findings = [*doctor.disks()]
    assert all("cannot be written to" in f.found for f in findings)
    assert "XDG_CACHE_HOME" in findings[1].remedy and "HF_HOME" in findings[2].remedy


def test_a_broken_package_is_a_finding(monkeypatch):
    def broken():
        raise ImportError("libcudart.so.13: cannot open\nmore")
        yield

    fine = Finding("disk", "1 GB")
    monkeypatch.setattr(doctor, "CHECKS", (broken, lambda: iter([fine])))
    found, after = doctor.findings()
    assert found.found == "cannot be checked: ImportError: libcudart.so.13: cannot open"
    assert found.subject == "broken" and "install" in found.remedy and after == fine


def test_a_folder_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(UserError, match="folder is gone; cd"):
        [*doctor.findings()]


def test_a_missing_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    (finding,) = doctor.compilers()
    assert finding.found == "no c++ and no ninja" and "install" in finding.remedy


@pytest.mark.parametrize(("remedy", "code"), [(None, 0), ("free some", 1)])
def test_something_to_do_is_exit_code_1(remedy, code, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([Finding("disk", "1 GB", remedy)]),))
    if code == 0:
        doctor.main([])
    else:
        with pytest.raises(SystemExit) as stop:
            doctor.main([])
        assert stop.value.code == 1
    assert capsys.readouterr().out.endswith("1 to do\n") == bool(remedy)


def test_a_training_that_fails_says_its_last_line(monkeypatch):
    monkeypatch.setattr(training_check, "BUILD", "raise SystemExit('no room')")
    result = training_check.train()
    assert (result.learned, result.text) == (False, "no room")


@pytest.mark.slow
def test_the_embedded_model_learns(monkeypatch):
    monkeypatch.setattr(training_check, "STEPS", 60)
    result = training_check.train()
    assert result.learned and result.text.startswith("60 steps, held-out loss 6.")
