"""Checks and parts of a resumed run, piece by piece; entire runs are in test_resume.py."""

import copy
import json
import random
from contextlib import closing
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from dschat.config import RLHFSettings, SFTSettings
from dschat.config.cli import parse
from dschat.data.batching import build_loader
from dschat.data.collators import PromptCollator
from dschat.errors import UserError
from dschat.train import checksums
from dschat.train.checkpoint_source import Position
from dschat.train.checkpoint_write import frozen_left_out
from dschat.train.checksums import frozen_checksum
from dschat.train.metrics import Continued, LogConfig, MetricLogger
from dschat.train.resume import RunPlan, model_files
from dschat.train.resume_engines import (
    check_restored_rates,
    check_same_frozen,
    check_same_groups,
    set_peak_rates,
)
from dschat.train.steps import StepPlan
from dschat.utils.distributed import set_random_seed
from dschat.utils.optim import build_optimizer, group_rates
from dschat.utils.optim_config import OptimizerConfig
from dschat.utils.random_state import RandomState
from dschat.utils.schedules import SCHEDULES, schedule_factory
from tests.helpers import tiny

OLD = OptimizerConfig(1e-3, loraplus_lr_ratio=16.0)
NEW = OptimizerConfig(2e-3, loraplus_lr_ratio=8.0)
STEPS = StepPlan(total_steps=14, epoch_steps=(7, 7), batches_per_step=2)


def sft(*argv: str) -> SFTSettings:
    return parse(SFTSettings, ["--model_name_or_path", "m", *argv], "")


def plan(*argv: str, rows: str = "abc", optimizer: OptimizerConfig = OLD) -> RunPlan:
    return RunPlan("step 1 (SFT)", sft(*argv), {"model": optimizer}, "fp32", rows, STEPS)


def saved(*groups: str) -> dict:
    """The record of a checkpoint of the plan above, as it comes back from its file."""
    groups = {"model": list(groups or ("lora_A", "lora_B"))}
    return json.loads(json.dumps(plan().record(groups, processes=2)))


def refusal(other: RunPlan, processes: int = 2) -> str:
    with pytest.raises(UserError) as error:
        other.check_continues("S", saved(), processes, with_new_rates=False)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_same_plan_goes_on():
    plan().check_continues("S", saved(), 2, with_new_rates=False)


def test_every_small_file_of_a_model_is_compared_before_its_rows(tmp_path):
    """As the run began: what changes later is noticed, and named before rows that it changes."""
    model = tiny.save_llama_folder(tmp_path / "model")
    argv = ["--model_name_or_path", str(model)]

    def now(rows: str = "abc") -> RunPlan:
        return replace(plan(*argv, rows=rows), model_files=model_files(sft(*argv)))

    record = json.loads(json.dumps(now().record({"model": ["lora_A"]}, processes=1)))
    digests = record["model_files"]["model_name_or_path"]
    files = [name for name, digest in digests.items() if digest is not None]
    small = {path.name for path in model.iterdir()} - {"model.safetensors"}
    assert {*files} == small and "chat_template.jinja" in files and len(files) >= 5

    def refused(rows: str = "abc") -> str:
        with pytest.raises(UserError) as error:
            now(rows).check_continues("S", record, 1, with_new_rates=False)
        return str(error.value)

    for name in files:
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        place = f"resume S: {name} of model_name_or_path {model}"
        assert refused(rows="abd") == (
            f"{place} is not as it was when the run began; put it back, or start a new run"
        )
        (model / name).unlink()
        assert refused() == f"{place} is no longer there; put it back, or start a new run"
        (model / name).write_bytes(content)
    (model / "added_tokens.json").write_text("{}")
    assert "added_tokens.json of model_name" in refused() and "remove it" in refused()
    del digests["added_tokens.json"]  # of a model on the hub, of which more may be cached by now
    now().check_continues("S", record, 1, with_new_rates=False)
    del record["model_files"]  # as earlier versions wrote it
    now().check_continues("S", record, 1, with_new_rates=False)


def test_what_may_change():
    free = ["--output_dir", "o", "--save_steps", "5", "--resume", "S", "--log_every", "3"]
    plan(*free, "--print_loss").check_continues("S", saved(), 2, with_new_rates=False)


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--seed", "7"], "seed 1234, now 7; give 1234"),
        (["--max_train_samples", "9"], "max_train_samples not given, now 9; drop it"),
        (["--lora_init", "B"], "lora_init A, now B; give A"),
        (["--train_base_model"], "train_base_model off, now on; give off"),
        (["--weight_decay", "0.1"], "weight_decay 0.0, now 0.1; give 0.0"),
        (["--data_path", "x", "y"], "data_path Dahoas/rm-static, now x y; give Dahoas"),
    ],
)
def test_every_other_setting_is_named_with_both_values(argv, told):
    assert refusal(plan(*argv)).startswith(f"resume S: saved with {told}")


def test_the_optimizer_of_a_json_is_a_setting(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"type": "Lion"}}))
    told = "saved with deepspeed_config.optimizer.type not given, now Lion"
    assert told in refusal(plan("--deepspeed_config", str(file)))
    assert "model.betas 0.9 0.95, now 0.9 0.99" in refusal(
        plan(optimizer=OptimizerConfig(1e-3, betas=(0.9, 0.99)))
    )


def test_rows_processes_and_stages():
    assert "the rows of data_path Dahoas/rm-static have changed" in refusal(plan(rows="abd"))
    assert "saved by 2 processes, now there are 1; start 2" in refusal(plan(), processes=1)
    assert "saved with zero_stage 0, now 3; give 0" in refusal(plan("--zero_stage", "3"))


def test_rates_are_refused_or_given_anew():
    other = plan(optimizer=NEW)
    assert "saved with loraplus_lr_ratio 16, now 8" in refusal(other)
    other.check_continues("S", saved(), 2, with_new_rates=True)
    slower = plan(optimizer=OptimizerConfig(5e-4, loraplus_lr_ratio=16.0))
    assert "a learning rate of 0.001 for lora_A, now 0.0005" in refusal(slower)


def test_a_ratio_that_nothing_trains_by_is_no_matter():
    other = plan(optimizer=OptimizerConfig(1e-3, loraplus_lr_ratio=8.0))
    other.check_continues("S", saved("decay", "no_decay"), 2, with_new_rates=False)


def test_actor_and_critic_each_have_a_ratio():
    models = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c"]
    settings = parse(RLHFSettings, models, "")

    def step_3(critic: OptimizerConfig) -> RunPlan:
        optimizers = {"actor": OLD, "critic": critic}
        return RunPlan("step 3 (PPO)", settings, optimizers, "fp32", "abc", STEPS)

    groups = {"actor": ["lora_A", "lora_B"], "critic": ["lora_A", "lora_B", "head"]}
    record = step_3(OLD).record(groups, 1)
    with pytest.raises(UserError, match="saved with critic_loraplus_lr_ratio 16, now 8"):
        step_3(NEW).check_continues("S", record, 1, with_new_rates=False)


def optimizer_and_schedule(config: OptimizerConfig, schedule: str) -> tuple:
    names = ("lora_A", "lora_B")
    groups = [
        {"name": n, "params": [torch.zeros(2, requires_grad=True)], "lr": config.rate(n)}
        for n in names
    ]
    optimizer = build_optimizer(groups, config)
    return optimizer, schedule_factory(schedule, 2, 12)(optimizer)


def walk(optimizer, schedule, steps: int) -> list[dict[str, float]]:
    rates = []
    for _ in range(steps):
        rates.append(group_rates(optimizer))
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_new_rates_are_those_of_a_run_that_had_them_from_the_start(name):
    old = optimizer_and_schedule(OLD, name)
    walk(*old, 5)
    optimizer, schedule = optimizer_and_schedule(NEW, name)
    optimizer.load_state_dict(old[0].state_dict())
    schedule.load_state_dict(old[1].state_dict())
    # Loading has brought the old rates back, in both.
    assert optimizer.param_groups[0]["initial_lr"] == schedule.base_lrs[0] == 1e-3
    with pytest.raises(RuntimeError, match="are not the configured"):
        check_restored_rates(optimizer, schedule, NEW)
    set_peak_rates(optimizer, schedule, NEW)
    check_restored_rates(optimizer, schedule, NEW)
    never_stopped = optimizer_and_schedule(NEW, name)
    assert walk(optimizer, schedule, 7) == walk(*never_stopped, 12)[5:]


def test_a_schedule_that_would_bring_the_old_rates_back_is_noticed():
    optimizer, schedule = optimizer_and_schedule(NEW, "linear")
    schedule.base_lrs = [1e-3, 16e-3]
    with pytest.raises(RuntimeError, match="would set lora_A by a peak"):
        check_restored_rates(optimizer, schedule, NEW)


def test_groups_and_frozen_weights_must_be_the_same():
    optimizer, _ = optimizer_and_schedule(OLD, "linear")
    check_same_groups("S", "critic", {"lora_A": 1.0, "lora_B": 1.0}, optimizer)
    with pytest.raises(
        UserError, match="the critic was saved with parameter groups lora_B, lora_A"
    ):
        check_same_groups("S", "critic", {"lora_B": 1.0, "lora_A": 1.0}, optimizer)
    check_same_frozen("S", {"model": "1"}, {"model": "1"})
    with pytest.raises(UserError, match="the reward's frozen weights"):
        check_same_frozen("S", {"model": "1", "reward": "2"}, {"model": "1"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checksum_is_of_what_is_frozen(dtype):
    module = tiny.adapted(tiny.tiny_llama()).to(dtype)
    first = frozen_checksum(module)
    assert frozen_checksum(copy.deepcopy(module)) == first
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        parameters["model.layers.0.mlp.up_proj.lora_A"].add_(1.0)
    assert frozen_checksum(module) == first
    with torch.no_grad():
        parameters["model.layers.0.mlp.up_proj.weight"][3, 4] *= 1.01
    assert frozen_checksum(module) != first


@pytest.mark.parametrize("change", ["rows in reverse", "two swapped", "configuration"])
def test_the_checksum_sees_what_a_sum_would_not(change):
    module = tiny.adapted(tiny.tiny_llama())
    first = frozen_checksum(module)
    weight = dict(module.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    with torch.no_grad():
        if change == "rows in reverse":
            weight.copy_(weight.flip(0))
        elif change == "two swapped":
            weight[0, :2] = weight[0, :2].flip(0).clone()
        else:
            module.config.rms_norm_eps = 1e-2
    assert frozen_checksum(module) != first


@pytest.mark.parametrize("count", [0, 1, 8, 9, 37])
def test_contents_are_summed_piece_by_piece_as_one(monkeypatch, count):
    """By whole numbers: each pattern times the odd number of its place."""
    monkeypatch.setattr(checksums, "_CHUNK_ON_CPU", 8)
    bits = torch.arange(count, dtype=torch.int32) * -123456789
    golden = 2**64 - 7046029254386353131
    expected = sum(b * (i * golden % 2**64 | 1) for i, b in enumerate(bits.tolist())) % 2**64
    assert checksums._weighted_bits(bits.view(torch.float32)) == expected


def test_the_checksum_does_not_see_where_a_model_lies():
    module = tiny.adapted(tiny.tiny_llama())
    first = frozen_checksum(module)
    module.config._name_or_path = "elsewhere"
    assert frozen_checksum(module) == first


def test_the_checksum_sees_packed_weights():
    module = torch.nn.Linear(2, 2)
    module.register_buffer("packed", torch.tensor([3, 200], dtype=torch.uint8), persistent=False)
    first = frozen_checksum(module)
    module.packed[1] = 201
    assert frozen_checksum(module) != first


def test_random_generators_go_on():
    def draw() -> tuple:
        return random.random(), np.random.normal(), torch.rand(3).tolist()

    set_random_seed(3)
    draw()
    state = RandomState().state_dict()
    expected = [draw(), draw()]
    set_random_seed(4)
    RandomState().load_state_dict(state)
    assert [draw(), draw()] == expected


def test_a_place_in_the_data():
    assert [STEPS.batches_of(step, 0) for step in (1, 7)] == [2, 14]
    assert STEPS.batches_of(8, 1) == 2
    position = Position(step=8, epoch=1, batch=2)
    assert [position.batches(epoch) for epoch in (1, 2)] == [2, 0]


def test_batches_that_were_used_up_are_not_read():
    read = []

    class Collator(PromptCollator):
        def __call__(self, rows):
            read.append(len(rows))
            return super().__call__(rows)

    rows = [{"prompt_ids": [5 + i] * (1 + i % 5), "length": 1 + i % 5} for i in range(11)]
    options = {"rank": 0, "world_size": 1, "seed": 1, "shuffle": True}
    loader = build_loader(datasets.Dataset.from_list(rows), Collator(0), 2, **options)
    whole = [batch.input_ids.tolist() for batch in loader.batches(1)]
    read.clear()
    assert [batch.input_ids.tolist() for batch in loader.batches(1, skip=4)] == whole[4:]
    assert len(read) == 2 and loader.batches_in(1) == 6
    assert list(loader.batches(1, skip=6)) == []
    assert [batch.input_ids.tolist() for batch in loader.batches(1)] == whole


def write_metrics(folder, steps: range, continued: Continued | None = None) -> str:
    with closing(MetricLogger(LogConfig(no_report=True), folder, 0, continued)) as log:
        for step in steps:
            log.log(step, {"loss": step / 2})
    return (folder / "metrics.jsonl").read_text()


def test_metrics_are_cut_and_go_on(tmp_path):
    whole = write_metrics(tmp_path / "whole", range(1, 9))
    run, state = tmp_path / "run", tmp_path / "state.jsonl"
    state.write_text(write_metrics(run, range(1, 4)))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')  # written after the save, and cut off
    assert write_metrics(run, range(4, 9), Continued(state, 3)) == whole
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_restarts_without_a_checkpoint_leave_one_file(tmp_path):
    """The longest, which need not be a restart's."""
    run, nothing = tmp_path / "run", Continued(None, 0)
    longest = write_metrics(run, range(1, 9))
    for end in (3, 4, 2):
        last = write_metrics(run, range(1, end), nothing)
    assert {path.name: path.read_text() for path in run.iterdir()} == {
        "metrics.jsonl": last,
        "metrics.unfinished.jsonl": longest,
    }


def test_metrics_of_another_run_are_kept(tmp_path):
    state = tmp_path / "state.jsonl"
    state.write_text(write_metrics(tmp_path / "first", range(1, 4)))
    other = write_metrics(tmp_path / "run", range(5, 6))
    write_metrics(tmp_path / "run", range(4, 9), Continued(state, 3))
    assert (tmp_path / "run" / "metrics.1.jsonl").read_text() == other


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--save_steps", "-1", "--output_dir", "o"], "save_steps is -1: give 0 or more"),
        (["--save_total_limit", "0"], "save_total_limit is 0: give at least 1"),
        (["--resume_with_new_rates"], "resume_with_new_rates: nothing is resumed; add resume"),
    ],
)
def test_flags_that_make_no_sense(argv, message):
    with pytest.raises(UserError) as error:
        sft(*argv)
    assert str(error.value).startswith(message)


def test_resume_with_and_without_a_value(tmp_path):
    with_output = ["--output_dir", "o"]
    assert sft(*with_output).run.checkpoint.resume is None
    assert sft("--resume", *with_output).run.checkpoint.resume == "newest"
    assert sft("--resume", "a/step-1", *with_output).run.checkpoint.resume == "a/step-1"
    file = tmp_path / "settings.yaml"
    file.write_text("resume: newest\noutput_dir: o\n")
    assert sft("--config", str(file)).run.checkpoint.resume == "newest"


def test_a_frozen_weight_is_in_no_checkpoint_under_any_of_its_names():
    class Engine(nn.Module):
        module_state_dict = DeepSpeedEngine.module_state_dict

        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module

        def random_ltd_enabled(self) -> bool:
            return False

    model = tiny.adapted(tiny.tiny_llama(tie_word_embeddings=True))
    engine, trained = Engine(model), {n for n, p in model.named_parameters() if p.requires_grad}
    with frozen_left_out(engine):
        assert engine.module_state_dict(exclude_frozen_parameters=True).keys() == trained
    model.lm_head.weight.requires_grad_(True)  # the embedding, too
    with frozen_left_out(engine):
        found = engine.module_state_dict(exclude_frozen_parameters=True).keys()
    assert found == trained | {"lm_head.weight", "model.embed_tokens.weight"}
