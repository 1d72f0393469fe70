"""A script of each family and step really trains, for a step or two, on a tiny model of its family.

Its recipe is kept but for the model, the data and what makes it large. On two ranks, at two ZeRO
stages that take turns, and in steps 1 and 3 of one family on four, at every stage, it makes the
steps that it makes on one.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from dschat.settings import flags_of
from dschat.utils.ds_utils import ZERO_STAGES
from tests.helpers.rounding import GRADIENTS, LOGPROBS
from tests.helpers.shell import TRAINING, fake_launchers, settings_class, started
from tests.helpers.steps import preference_rows, run_worker, write_rows
from tests.helpers.steps_outputs import assert_all_finite, column, records
from tests.helpers.tiny import SHAPE, byte_tokenizer
from tests.text.templates import FAMILIES, THINKING, Family, with_template
from tests.training.test_scripts import BASH

GEMMA = Family(
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + "
    "('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim + "
    "'<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    "<end_of_turn>",
    ("<start_of_turn>", "<end_of_turn>"),
)
TEXT = {**SHAPE, "vocab_size": 288, "max_position_embeddings": 160, "head_dim": 8}
VISION = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 28},
    **{"num_attention_heads": 4, "patch_size": 14},
}
OPT = {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}
GPT = {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160}
BLOOM = {**TEXT, "n_layer": 2, "n_head": 4}
# family: its shape, its chat template; scripts of steps 1, 2, 3 and of DPO, as far as it has them
CASES: dict[str, tuple[PretrainedConfig, Family | None, list[str]]] = {
    "opt": (
        AutoConfig.for_model("opt", **OPT),
        None,
        [f"opt/single_gpu/run_{n}.sh" for n in ("6.7b_lora", "350m", "6.7b_lora")],
    ),
    "llama2": (
        AutoConfig.for_model("llama", **TEXT),
        None,
        [f"llama2/run_llama2_7b_{n}.sh" for n in ("lora", "lora", "mixz")],
    ),
    "bloom": (AutoConfig.for_model("bloom", **BLOOM), None, ["other_language/run_chinese.sh"]),
    "mgpt": (AutoConfig.for_model("gpt2", **GPT), None, ["other_language/run_japanese.sh"]),
    "llama3": (
        AutoConfig.for_model("llama", **TEXT),
        FAMILIES["llama-3"],
        [f"llama3/single_gpu/run_{n}.sh" for n in ("8b", "8b", "8b_one_trunk")],
    ),
    "qwen3": (
        AutoConfig.for_model("qwen3", **TEXT),
        THINKING,
        ["qwen3/single_gpu/run_0.6b.sh"] * 4,
    ),
    "gemma3": (
        AutoConfig.for_model("gemma3", text_config=TEXT, vision_config=VISION),
        GEMMA,
        ["gemma3/single_gpu/run_4b.sh"] * 4,
    ),
    "gemma3 text": (
        AutoConfig.for_model("gemma3_text", **TEXT),
        GEMMA,
        ["gemma3/single_gpu/run_1b.sh"],
    ),
}
BATCH = 4  # rows of a step, on all ranks together
STEPS = ["step1_supervised", "step2_reward_model", "step3_rlhf", "step2_dpo"]
OUTPUTS = ["sft", "reward", "ppo", "dpo"]
DRAWS_AT_3 = ("gemma3",)  # numbers for its images' weights as it loads: adapters begin with others
ON_FOUR = ("qwen3/sft", "qwen3/ppo")  # what trains on four ranks, not two
# Ranks draw the same answers at each stage: the static cache, which ZeRO-3 has none of, draws in
# another order, and ranks at ZeRO-3 go on drawing until the longest answer of all has ended.
EQUAL_DRAWS = {"rollout_engine": "generate", "min_answer_seq_len": 8}
FIGURES = ("step", "loss", "accuracy", "reward", "kl")
SMALL = {
    "dropout": 0.0,
    "data_path": "data.jsonl",
    "data_split": "1",
    "data_output_path": "cache",
    "dtype": "fp32",
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "generation_batches": 1,
    "max_seq_len": 128,
    "max_prompt_seq_len": 96,
    "max_answer_seq_len": 8,
    "max_steps": 2,
    "num_warmup_steps": 0,
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), BATCH),
    **dict.fromkeys(("per_device_generation_batch_size", "per_device_training_batch_size"), BATCH),
    **dict.fromkeys(("lora_dim", "actor_lora_dim", "critic_lora_dim"), 4),
}


def save_model(folder: Path, config: PretrainedConfig, template: Family | None) -> None:
    """A model of this shape with the byte tokenizer, under the family's template or none."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if template is not None:
        tokenizer = with_template(tokenizer, template)
        del tokenizer.init_kwargs["prompt_format"]
    tokenizer.save_pretrained(folder)


def command(
    shell, name: str, output: str, script: str, stage: int | None = None, ranks: int = 1
) -> list[str]:
    """main.py and its arguments, as the script starts it, made small.

    Args:
        stage: ZeRO's; None: the recipe's. ranks: they share a batch of `BATCH` rows.
    """
    (folder,) = TRAINING.glob(f"{STEPS[OUTPUTS.index(output)]}*")
    out = name if stage is None else split_folder(name, stage, ranks)
    words = [f"{out}/{output}", "" if stage is None else str(stage)]
    if output == "ppo":
        stages = [str(stage or 0)] * 2
        words = [f"{name}/sft", f"{name}/reward", *stages, f"{out}/ppo"]
    if "one_trunk" in script:
        words[:2] = [f"{word}/adapter" for word in words[:2]]
    start = started(shell(BASH, str(folder / "training_scripts" / script), *words))
    settings = start.settings()
    flags = {flag.name for flag in flags_of(settings_class(start.program))}
    small = {flag: value for flag, value in SMALL.items() if flag in flags}
    small |= dict.fromkeys(
        (flag for flag in small if flag.startswith("per_device")), BATCH // ranks
    )
    for role in ("", "actor_", "critic_"):
        if f"{role}lora_dim" in small and not start_rank(settings, role):
            del small[f"{role}lora_dim"]
    if output == "ppo" and ranks > 1:
        small |= EQUAL_DRAWS
    if output != "ppo":
        small["model_name_or_path"] = f"{name}/model"
    more = [str(word) for flag, value in small.items() for word in (f"--{flag}", value)]
    return [str(start.program.relative_to(TRAINING.parent)), *start.arguments, *more]


def split_folder(name: str, stage: int, ranks: int) -> str:
    """Where runs of a family on several ranks write."""
    return f"{name}/zero{stage}-{ranks}"


def start_rank(settings: object, role: str) -> int:
    """The rank of the adapters that a recipe gives to a role."""
    return getattr(settings, role.rstrip("_") or "model").lora.lora_dim


def stages(argv: list[str]) -> list[int]:
    """ZeRO stages of a recipe: all, but 0 where it offloads, and 3 where roles share one trunk."""
    recipe = Path(argv[2]).read_text()
    without = {0: "^offload: true", 3: "^share_trunk: all"}
    return [s for s in ZERO_STAGES if s not in without or not re.search(without[s], recipe, re.M)]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "shell").mkdir()
    write_rows(tmp_path / "data.jsonl", preference_rows(16, seed=0))
    for name, (config, template, _) in CASES.items():
        save_model(tmp_path / name / "model", config, template)
    return fake_launchers(tmp_path / "shell", monkeypatch)


def trained(plan: dict[str, list[str]], folder: Path, ranks: int) -> None:
    """Run all; each writes to its place, and its figures are finite."""
    results, _ = run_worker(list(plan.values()), folder, ranks=ranks)
    errors = {p: r.stderr[-1500:] for p, r in zip(plan, results, strict=True) if r.code}
    assert errors == {}
    for place in plan:
        assert_all_finite(folder / place)


def splits(number: int, place: str, argv: list[str]) -> list[tuple[int, int]]:
    """Ranks and ZeRO stages of a script's runs; `number` turns the stage that is not the last."""
    every = stages(argv)
    if place in ON_FOUR:
        return [(4, stage) for stage in every]
    return [(2, every[number % (len(every) - 1)]), (2, every[-1])]


@pytest.mark.slow
def test_a_script_of_each_family_trains_a_tiny_model_of_it(
    shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On one rank at the recipe's stage; on two or four at others, with the same figures."""
    alone: dict[str, list[str]] = {}
    split: dict[int, dict[str, list[str]]] = {2: {}, 4: {}}
    found: dict[str, dict[int, Path]] = {}
    for number, (name, (_, _, scripts)) in enumerate(CASES.items()):
        for output, script in zip(OUTPUTS, scripts, strict=False):
            place = f"{name}/{output}"
            alone[place] = argv = command(shell, name, output, script)
            for ranks, stage in splits(number, place, argv):
                out = f"{split_folder(name, stage, ranks)}/{output}"
                split[ranks][out] = command(shell, name, output, script, stage, ranks)
                found.setdefault(place, {})[stage] = tmp_path / out
    for output in ("sft", "reward", "ppo"):
        of_all = {stage for place in found if place.endswith(output) for stage in found[place]}
        assert of_all == {*ZERO_STAGES}, output
    monkeypatch.undo()  # variables of the shell; without them processes start warm
    trained(alone, tmp_path, ranks=1)
    for ranks, plan in split.items():
        trained(plan, tmp_path, ranks=ranks)
    for place, runs in found.items():
        family, output = place.split("/")
        # Ranks draw from generators of their own: their answers are not those of one rank.
        expected = min(runs.items())[1] if output == "ppo" else tmp_path / place
        for stage, folder in runs.items():
            if stage != 3 or family not in DRAWS_AT_3:
                assert_same_figures(folder, expected)


def assert_same_figures(folder: Path, expected: Path) -> None:
    """Two runs' records of training and of evaluation have the same figures.

    They are means of log-probabilities or of scores, whose terms are added in another order. What
    training has changed of them is off by a share too: of a gradient off by a share of GRADIENTS,
    Adam's mean and root mean square are, and its step m / (s + eps) by twice that.
    """
    for kind in ("train", "eval"):
        rows, same = (records(at, kind) for at in (folder, expected))
        for name in FIGURES:
            if name in same[0]:
                found, wanted = column(rows, name), column(same, name)
                allowed = LOGPROBS + 2 * GRADIENTS * (wanted - wanted[0]).abs()
                assert ((found - wanted).abs() <= allowed).all(), (
                    folder,
                    kind,
                    name,
                    found,
                    wanted,
                )
