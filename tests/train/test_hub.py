"""`push_to_hub` of a run: what is checked before it trains, and what a push does after it."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dschat.config import SFTSettings
from dschat.config.unused import unused_flags
from dschat.errors import UserError
from dschat.models.save_plan import MERGED, SavePlan
from dschat.rlhf.prepare import PPORun
from dschat.train import run_lock
from dschat.train.hub import HubConfig
from dschat.train.prepare import Run
from dschat.train.run_config import RunConfig
from tests.helpers.hub import Hub, offer, served
from tests.helpers.steps import (
    DPO,
    PPO,
    REWARD,
    ROOT,
    SFT,
    free_port,
    launch,
    write_inputs,
    write_rows,
)
from tests.helpers.steps import preference_rows as rows

NAME = "me/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return offer(Hub(), monkeypatch)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors", "README.md", "metrics.jsonl"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_a_finished_model_goes_there_from_rank_0_alone(finished, hub, capsys):
    HubConfig().push(finished, rank=0)
    HubConfig(NAME).push(finished, rank=1)
    assert hub.files == {} and capsys.readouterr().out == ""
    HubConfig(NAME).push(finished, rank=0)
    assert hub.files == {NAME: {"config.json", "model.safetensors", "README.md"}}
    assert hub.private == {NAME: True}
    out = capsys.readouterr().out
    assert out == f"{finished}: goes to me/model on the Hub\nhttps://hub/me/model\n"
    HubConfig("me/open", push_public=True).push(finished, rank=0)
    assert hub.private["me/open"] is False


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (HubConfig("others/model"), "others/model: PermissionError: 403 Forbidden: you are not"),
        (HubConfig("me/open"), "me/open: is public on the Hub; add --push_public"),
        (HubConfig("me/closed", True), "me/closed: is private on the Hub; drop --push_public"),
        (HubConfig("me/stop"), "stopped"),
    ],
)
def test_what_hinders_a_push_is_a_line_and_the_model_stays(finished, hub, capsys, config, reason):
    hub.private |= {"me/open": False, "me/closed": True}
    hub.stops = {"me/stop"}
    config.push(finished, rank=0)
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(f"not pushed: {reason}")
    again = f"dschat push {finished} {config.push_to_hub}" + " --public" * config.push_public
    assert line.endswith(f"; the model is complete, and goes there by: {again}")
    assert hub.files == {} and (finished / "config.json").exists()


def test_a_run_that_could_not_push_does_not_begin(tmp_path, hub, monkeypatch):
    run = RunConfig.of(output_dir=str(tmp_path / "out"), push_to_hub=NAME)
    run.check_output()
    for what, value, message in (
        ("get_token", lambda: None, "push_to_hub me/model: the Hub asks who you are"),
        ("constants.HF_HUB_OFFLINE", True, "push_to_hub me/model: HF_HUB_OFFLINE is set"),
    ):
        monkeypatch.setattr(f"huggingface_hub.{what}", value)
        with pytest.raises(UserError, match=message):
            run.check_output()
        RunConfig.of(output_dir=str(tmp_path / "out")).check_output()
    run_lock.release()
    for name in ("model", "me/../x"):
        with pytest.raises(UserError, match=f"push_to_hub is {name}: give OWNER/NAME"):
            RunConfig.of(push_to_hub=name)
    settings = SFTSettings.of(model_name_or_path="m", push_public=True)
    assert "--push_public does nothing without --push_to_hub" in list(unused_flags(settings))


def test_an_adapter_alone_needs_a_base_that_others_have(tmp_path):
    config, alone = HubConfig(NAME), SavePlan(merged=False)
    config.check_plan(alone, "facebook/opt-125m")
    config.check_plan(MERGED, str(tmp_path))
    HubConfig().check_plan(alone, str(tmp_path))
    with pytest.raises(UserError, match="alone; drop lora_save adapter"):
        config.check_plan(alone, str(tmp_path))


def test_every_step_pushes_when_all_is_written():
    for program in (SFT, REWARD, DPO, PPO):
        text = (ROOT / program).read_text(encoding="utf-8")
        _, end = text.split("    # 4. ")
        assert re.search(r" (save_hf_format|save_reward_model|run\.save)\(", end), program
        assert end.endswith('    run.end(log)\n\n\nif __name__ == "__main__":\n    run_cli(main)\n')
    order: list[str] = []
    step = SimpleNamespace(
        checkpointer=SimpleNamespace(mark_end=lambda: order.append("ended")),
        config=SimpleNamespace(
            output_dir="out", hub=SimpleNamespace(push=lambda *given: order.append(str(given)))
        ),
        ctx=SimpleNamespace(rank=0),
    )
    log = SimpleNamespace(close=lambda: order.append("closed"))
    for run, folder in ((Run, "out"), (PPORun, "out/actor")):
        order.clear()
        run.end(SimpleNamespace(MODEL=run.MODEL, **vars(step)), log)
        assert order == ["ended", "closed", str((Path(folder), 0))]


@pytest.mark.slow
def test_a_run_of_two_ranks_pushes_once_by_the_hubs_own_client(tmp_path: Path):
    write_inputs(tmp_path)
    data = write_rows(tmp_path / "few.jsonl", rows(24, seed=0))
    private: dict[str, bool] = {}
    files: dict[str, dict[str, bytes]] = {}
    with served(private, files) as address:
        words = ["env", "HF_HUB_OFFLINE=0", f"HF_ENDPOINT={address}", "HF_TOKEN=hf_key"]
        words += [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        words += ["--master_port", free_port(), "-m", "dschat", "sft", "--dtype", "fp32"]
        words += ["--model_name_or_path", "model", "--data_path", str(data), "--lora_dim", "4"]
        words += ["--max_seq_len", "64", "--output_dir", "out", "--push_to_hub", NAME]
        done = launch(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert private == {NAME: True}
    sent = files[NAME]
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= sent.keys()
    assert not {"metrics.jsonl", "report.html", "run.json"} & sent.keys()
    assert sent["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert done.stdout.count("goes to me/model on the Hub") == 1
