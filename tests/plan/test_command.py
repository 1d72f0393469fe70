"""The planner's command: what it prints, what it refuses, what it says to change."""

import json

import pytest
import torch

from dschat.config import RewardSettings, RLHFSettings, SFTSettings
from dschat.errors import UserError
from dschat.models.config import build_causal_lm
from dschat.plan.__main__ import main
from dschat.plan.memory import plan_memory
from dschat.plan.roles import GENERATION, GIB
from dschat.plan.shapes import KNOWN, config_of, known_in
from dschat.plan.speed import Cluster, plan_speed
from dschat.utils.gpus import BY_NAME, gpu_of_device, named_gpu
from tests.helpers.tiny import byte_tokenizer, tiny_llama

RECIPE = "dschat/recipes/opt/single_gpu/reward_350m.yaml"
BLOOM = "dschat/recipes/bloom/single_node/sft_1.1b_chinese.yaml"
RUN = "smollm2/single_gpu/135m"


def planned(capsys, *words: str) -> dict:
    main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_recipe_fits_one_gpu_and_not_a_small_one(capsys):
    plan = planned(capsys, "--config", RECIPE, "--gpu", "a6000", "--usd_per_gpu_hour", "1")
    assert plan["fits"] and plan["remedies"] == []
    # OPT-350M without its output head, with a value head of 512 weights.
    trained = 331_196_416 + 512
    by_kind = {kind: plan["held"]["model"][kind] for kind in ("weights", "gradients", "optimizer")}
    assert by_kind == {"weights": 2 * trained, "gradients": 4 * trained, "optimizer": 12 * trained}
    assert plan["usd"] == pytest.approx(plan["seconds"] / 3600)
    small = planned(capsys, "--config", RECIPE, "--memory", "8")
    assert not small["fits"]
    changes = [remedy["change"] for remedy in small["remedies"]]
    assert changes[0] == "--gradient_checkpointing"
    assert small["remedies"][-1]["total"] <= 8 * GIB
    saved = sum(remedy["saved"] for remedy in small["remedies"])
    assert small["total"] - saved == pytest.approx(small["remedies"][-1]["total"])
    words = list[str]()
    for remedy in small["remedies"]:
        words += remedy["change"].split()
        assert planned(capsys, "--config", RECIPE, *words)["total"] == remedy["total"]


@pytest.mark.slow
def test_the_text_has_every_role_and_says_what_is_assumed(capsys):
    script = "training/step3_rlhf_finetuning/training_scripts/opt/single_gpu/run_1.3b.sh"
    main(["--script", script, "--gpu", "l40s"])
    told = capsys.readouterr().out
    for part in ("fits: ", "| actor |", "| critic |", "| reward |", "generation: cache", "assumed"):
        assert part in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --config RECIPE.yaml, or --script"),
        (["--config", RECIPE, "--gpu", "a600"], "did you mean a6000"),
        (["--config", RECIPE, "--model", "opt-351m"], "did you mean opt-350m"),
        (["--config", RECIPE, "--gpus", "0"], "gpus is 0"),
        (["--config", RECIPE, "--efficiency", "40"], "efficiency is 40"),
        (["--config", RECIPE, "--script", RECIPE], "give --config RECIPE.yaml, or --script"),
        (["--config", "no.yaml"], "config no.yaml: no such file"),
        (["--script", "no.sh"], "script no.sh: no such file"),
        (["--config", RECIPE, "--lora_dimm", "4"], "did you mean --lora_dim"),
        (["--config", RECIPE, "--gpu", "3090"], "for one that is not here give its like, and its"),
        (["--config", "opt/single_gpu/1.3"], "config opt/single_gpu/1.3: no such file"),
        (["--config", "quickstart"], "it names no model to plan for; give --model"),
        (["--config", RUN, "--step", "dpo"], "step dpo: .* has none; its stages are sft, reward"),
        (["--config", RECIPE, "--max_seq_len", "4096"], "has 2048 positions; give at most 2048"),
        (["--config", BLOOM, "--packing"], "packing: model bigscience/bloom-1b1 takes no position"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        main(words)


def test_a_folder_is_planned_by_its_config(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    recipe = tmp_path / "sft_mine.yaml"
    recipe.write_text(f"model_name_or_path: {tmp_path}\nmax_seq_len: 32\n")
    plan = planned(capsys, "--config", str(recipe))
    assert plan["held"]["model"]["weights"] == 2 * sum(p.numel() for p in tiny_llama().parameters())


def test_a_pipeline_is_planned_stage_by_stage(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path / 'model'}\nstages:\n  sft: {{max_seq_len: 32}}\n  reward: "
        "{max_seq_len: 32}\n"
    )
    words = ("--config", str(tmp_path / "run.yaml"), "--per_device_train_batch_size", "2")
    sft, reward = planned(capsys, *words)
    weights = [plan["held"]["model"]["weights"] for plan in (sft, reward)]
    head = 2 * tiny_llama().lm_head.weight.numel() - 2 * 32  # a value head of 32 in its place
    assert weights[0] - weights[1] == head
    assert [plan["title"].split(", ")[1] for plan in (sft, reward)] == ["sft", "reward"]
    assert planned(capsys, *words, "--step", "reward") == reward


def test_a_library_s_pipeline_is_found_by_its_name(capsys):
    plan = planned(capsys, "--config", RUN, "--step", "sft", "--gpu", "4090")
    assert plan["fits"] and plan["title"].endswith("run_135m.yaml, sft")


def test_known_models_have_their_published_sizes():
    """In millions: of the table of each paper or model card."""
    sizes = {"opt-1.3b": 1316, "opt-6.7b": 6658, "llama-3-8b": 8030, "gemma-3-4b": 4300}
    for name, millions in sizes.items():
        with torch.device("meta"):
            module = build_causal_lm(config_of(name))
        assert round(sum(p.numel() for p in module.parameters()) / 1e6) == millions
    assert known_in("a Llama-3-8B-Instruct actor and an OPT-350M critic") == [
        "llama-3-8b",
        "opt-350m",
    ]
    assert config_of("google/gemma-3-1b-it").hidden_size == 1152
    assert KNOWN.keys() >= {"opt-125m", "opt-66b"}


@pytest.mark.slow
def test_more_ranks_share_what_zero_shares():
    settings = RewardSettings.of(model_name_or_path="m", max_seq_len=16, zero_stage=3)
    one, eight = (
        plan_memory(settings, {"model": config_of("opt-125m")}, "bf16", ranks).held["model"]
        for ranks in (1, 8)
    )
    for kind in ("weights", "optimizer", "gradients"):
        assert eight[kind] == one[kind] / 8


@pytest.mark.slow
def test_roles_on_one_trunk_hold_one():
    flags = {
        "actor_model_name_or_path": "a",
        "critic_model_name_or_path": "b",
        "actor_lora_dim": 4,
        "critic_lora_dim": 4,
        "max_prompt_seq_len": 16,
        "max_answer_seq_len": 16,
    }
    configs = {name: config_of("opt-125m") for name in ("actor", "critic", "reward")}

    def weights(**more: str | int) -> float:
        plan = plan_memory(RLHFSettings.of(**flags, **more), configs, "bf16", 1)
        return sum(kinds["weights"] for kinds in plan.held.values())

    actor = 2 * 125_239_296
    assert weights(share_trunk="all") == actor
    head = 2 * 768
    assert weights() == 2 * actor + head
    assert weights(share_trunk="none") == 4 * actor + 2 * head


def test_gpus_by_device_name_and_by_short_name():
    names = {
        "NVIDIA A100-PCIE-40GB": "a100-40",
        "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA RTX A6000": "a6000",
        "NVIDIA GeForce RTX 4090": "4090",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA B200": "b200",
        "NVIDIA GB200": "gb200",
    }
    for device, name in names.items():
        assert gpu_of_device(device) == named_gpu(name)
    assert gpu_of_device("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert all(gpu.memory and gpu.bandwidth and gpu.bf16 for gpu in BY_NAME.values())


def test_communication_by_hand():
    """16 GB over 8 GPUs: 7/8 of it at 70 % of 300 GB/s; over machines at 25 GB/s."""
    cluster = Cluster(named_gpu("a100-80"), ranks=8)
    assert cluster.ring_seconds(16e9) == pytest.approx(14e9 / 210e9)
    apart = Cluster(named_gpu("a100-80"), ranks=8, nodes=2)
    assert apart.ring_seconds(16e9) == pytest.approx(14e9 / 17.5e9)
    assert Cluster(named_gpu("a100-80"), ranks=1).ring_seconds(16e9) == 0


@pytest.mark.slow
def test_shards_near_by_by_hand(tmp_path):
    """A second copy of the weights in shards of 8; all but what trains is gathered from near by."""
    file = "dschat/recipes/deepspeed/near_shards_8.json"
    flags = {"model_name_or_path": "m", "max_seq_len": 16, "zero_stage": 3, "lora_dim": 4}
    configs = {"model": config_of("opt-125m")}
    far, near = (
        (settings := SFTSettings.of(**flags, **more), plan_memory(settings, configs, "bf16", 16))
        for more in ({}, {"deepspeed_config": file})
    )
    assert near[1].held["model"]["weights"] == 3 * far[1].held["model"]["weights"]
    cluster = Cluster(named_gpu("a100-80"), ranks=16, nodes=2)
    counted = far[1].roles["model"].counted
    frozen, trained = 2 * (counted.base + counted.adapters - counted.trained), 2 * counted.trained
    # GB/s: 300 in a machine, 25 between two, at 70 %.
    seconds = [plan_speed(*each, configs, cluster)[0].sends for each in (far, near)]
    slow, fast = 15 / 16 / 17.5e9, 7 / 8 / 210e9
    assert seconds == pytest.approx(
        [(2 * frozen + 3 * trained) * slow, (2 * frozen + trained) * fast + 2 * trained * slow]
    )


@pytest.mark.slow
def test_rollouts_on_gathered_weights_send_once_and_hold_all():
    flags = {"actor_model_name_or_path": "a", "advantage_estimator": "grpo", "actor_zero_stage": 3}
    flags |= {"max_prompt_seq_len": 16, "max_answer_seq_len": 16, "answers_per_prompt": 2}
    flags |= {"reward_function": ("m:f",)}
    configs, cluster = {"actor": config_of("opt-125m")}, Cluster(named_gpu("a100-80"), ranks=8)

    def generation(**more: bool) -> tuple[float, float]:
        settings = RLHFSettings.of(**flags, **more)
        plan = plan_memory(settings, configs, "bf16", 8)
        (phase,) = (phase for phase in plan.phases if phase.name == GENERATION)
        return phase.total, plan_speed(settings, plan, configs, cluster)[0].sends

    (layers, per_token), (whole, once) = generation(), generation(gather_for_rollouts=True)
    assert whole - layers == 2 * 125_239_296
    assert per_token == pytest.approx(16 * once) and once > 0
