"""Wrong input ends each shipped program with one line and exit code 2, before weights are read."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import LlamaForSequenceClassification

from tests.helpers.data_error_cases import WRONG_DATA, WRONG_FLAGS, file_of, write_wrong_data
from tests.helpers.role_error_cases import WRONG_ROLES, write_wrong_roles
from tests.helpers.steps import (
    PPO,
    PROMPT_EVALUATION,
    REWARD,
    REWARD_EVALUATION,
    ROOT,
    SFT,
    Result,
    launch,
    preference_rows,
    run_worker,
    write_inputs,
    write_rows,
)
from tests.helpers.tiny import byte_tokenizer, tiny_llama

TWO_MODELS = ["--actor_model_name_or_path", "model", "--critic_model_name_or_path", "reward"]
COMMON = ["--data_output_path", "cache", "--dtype", "fp32"]
SHORT = ["--max_seq_len", "64"]
STEP1 = [SFT, "--model_name_or_path", "model", "--data_path", "data", *COMMON, *SHORT]
STEP2 = [REWARD, "--model_name_or_path", "model", "--data_path", "data", *COMMON, *SHORT]
STEP3 = [PPO, *TWO_MODELS, "--data_path", "data", *COMMON]
STEP3 += ["--max_prompt_seq_len", "48", "--max_answer_seq_len", "8"]


@dataclass(frozen=True)
class Case:
    """A command line, and what its message must name: the value, the place, the remedy."""

    argv: list[str]
    says: str


CASES = {
    "unknown flag": Case(
        [*STEP1, "--zero_stag", "2"],
        r"unknown flag --zero_stag; did you mean --zero_stage\?",
    ),
    "word for a number": Case(
        [*STEP2, "--max_seq_len", "long"],
        r"argument --max_seq_len: invalid int value: 'long'",
    ),
    "required flag": Case([SFT, "--data_path", "data"], r"model_name_or_path is required"),
    "no model folder": Case(
        [*STEP1, "--model_name_or_path", "./nowhere"],
        r"'\./nowhere' is not a folder: give a folder that holds tokenizer\.json",
    ),
    "no config in the model folder": Case(
        [*STEP1, "--model_name_or_path", "tokenizer-only"],
        r"model tokenizer-only: no readable config\.json .*; give a model folder",
    ),
    "hub id without a network": Case(
        [*STEP1, "--model_name_or_path", "nobody/no-such-model"],
        r"'nobody/no-such-model' does not load .*: give a model folder",
    ),
    "no data file": Case(
        [*STEP1, "--data_path", "./nothing.jsonl"],
        r"data_path \./nothing\.jsonl: no such file or folder; check the path",
    ),
    "no prompt column": Case(
        [*STEP1, "--data_path", "no-prompt.jsonl"],
        r"no-prompt\.jsonl line 1: no column 'prompt' \(columns: question, chosen\); rename",
    ),
    "no rejected column in step 2": Case(
        [*STEP2, "--data_path", "no-rejected.jsonl"],
        r"no-rejected\.jsonl line 3 has no 'rejected' \(1 of \d+ rows lack it\), which phase 2",
    ),
    "malformed row": Case(
        [*STEP3, "--data_path", "malformed.jsonl"],
        r"malformed\.jsonl line 2: not JSON \(.*\); give one object a line",
    ),
    "row of a wrong type": Case(
        [*STEP1, "--data_path", "wrong-type.jsonl"],
        r"wrong-type\.jsonl line 2: column 'chosen' is a number, needs text; fix or drop the row",
    ),
    "empty file": Case(
        [*STEP2, "--data_path", "empty.jsonl"],
        r"empty\.jsonl: holds no rows; give a file with at least one",
    ),
    "no share of the data": Case(
        [*STEP1, "--data_split", "0,5,5"],
        r"phase 1 .* gets no rows of data under data_split '0,5,5': give phase 1 a larger share",
    ),
    "no layer for LoRA in step 1": Case(
        [*STEP1, "--lora_dim", "4", "--lora_module_name", "decoder.layers."],
        r"lora_module_name 'decoder\.layers\.' matches no layer: use all-linear, .*"
        r"layers are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    ),
    "no layer for LoRA in step 2": Case(
        [*STEP2, "--lora_dim", "4", "--lora_module_name", "fc1"],
        r"lora_module_name 'fc1' matches no layer: .*q_proj",
    ),
    "no layer for the actor's LoRA": Case(
        [*STEP3, "--actor_lora_dim", "4", "--actor_lora_module_name", "fc1"],
        r"lora_module_name 'fc1' matches no layer: .*q_proj",
    ),
    "fp16 on the CPU": Case(
        [*STEP1, "--dtype", "fp16"],
        r"dtype fp16 cannot train on cpu: use bf16 or fp32",
    ),
    "offload without ZeRO": Case(
        [*STEP2, "--offload"],
        r"offload needs ZeRO: give a zero_stage of 1, 2 or 3, or drop offload",
    ),
    "offload without ZeRO in step 3": Case(
        [*STEP3, "--offload", "--actor_zero_stage", "2"],
        r"offload needs ZeRO: ",
    ),
    "scheduler in the DeepSpeed JSON": Case(
        [*STEP1, "--deepspeed_config", "scheduler.json"],
        r"deepspeed_config scheduler\.json: remove the scheduler block, .*lr_scheduler_type",
    ),
    "critic without a head": Case(
        [*STEP3, "--critic_model_name_or_path", "model"],
        r"reward model model: no score\.weight or v_head\.weight in it; train one with step 2 "
        r"first, or .* critic_model_name_or_path model, init_head_randomly",
    ),
    **{name: Case([*STEP3, *flags.split()], says) for name, (flags, says) in WRONG_ROLES.items()},
    "two tokenizers": Case(
        [*STEP3, "--critic_model_name_or_path", "other-tokenizer"],
        r"other-tokenizer: its tokenizer is not that of model; train actor and reward model from .*"
        r"or keep it for rewards alone: reward_model_name_or_path other-tokenizer, "
        r"critic_model_name_or_path model, init_head_randomly",
    ),
    "output folder that is a file": Case(
        [*STEP3, "--output_dir", "scheduler.json"],
        r"output_dir scheduler\.json: is a file; give a folder",
    ),
    "evaluation of a model without a head": Case(
        [REWARD_EVALUATION, *STEP2[1:]], r"reward model model: no score\.weight"
    ),
    "second model of a comparison": Case(
        [
            PROMPT_EVALUATION,
            *("--model_name_or_path_baseline", "model"),
            *("--model_name_or_path_finetune", "./nowhere"),
        ],
        r"'\./nowhere' is not a folder",
    ),
    "format that the model never learned": Case(
        [*STEP2, "--prompt_format", "chat"],
        r"--prompt_format chat: .*model was trained with the format 'dschat'; leave the flag out",
    ),
    "two prompt formats": Case(
        [*STEP3, "--critic_model_name_or_path", "other-format"],
        r"other-format: trained with the prompt format 'chat', but .*model with 'dschat'; train",
    ),
    **{
        name: Case([*STEP1, "--data_path", file_of(name), *flags], re.escape(file_of(name)) + says)
        for name, (_, flags, says) in WRONG_DATA.items()
    },
    **{name: Case([*STEP1, *flags], says) for name, (flags, says) in WRONG_FLAGS.items()},
}


def write_wrong_inputs(folder: Path) -> None:
    """The wrong inputs that the cases name, beside a sound model and sound data."""
    write_inputs(folder)
    good = preference_rows(20, seed=2)
    write_rows(folder / "no-prompt.jsonl", [{"question": "a", "chosen": "b"}])
    lacking = [row | ({"rejected": None} if i == 2 else {}) for i, row in enumerate(good)]
    write_rows(folder / "no-rejected.jsonl", lacking)
    write_rows(folder / "wrong-type.jsonl", [good[0], good[1] | {"chosen": 3}])
    (folder / "malformed.jsonl").write_text(json.dumps(good[0]) + "\n{'prompt': 1}\n")
    (folder / "empty.jsonl").touch()
    (folder / "scheduler.json").write_text('{"scheduler": {"type": "WarmupLR"}}')
    byte_tokenizer().save_pretrained(folder / "tokenizer-only")
    tiny_llama().save_pretrained(folder / "other-tokenizer")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder / "other-tokenizer")
    write_reward_folder(folder / "reward")
    write_wrong_data(folder)
    write_wrong_roles(folder)
    tokenizer = byte_tokenizer()
    tokenizer.init_kwargs["prompt_format"] = "chat"
    tokenizer.save_pretrained(folder / "other-format")
    tokenizer.chat_template = None
    del tokenizer.init_kwargs["prompt_format"]
    tokenizer.save_pretrained(folder / "no-template")


def write_reward_folder(folder: Path) -> None:
    """A folder as step 2 writes it: a trunk with a head of one label."""
    config = tiny_llama(max_position_embeddings=128).config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """The result of each case; all of them run in one process."""
    folder = tmp_path_factory.mktemp("errors")
    write_wrong_inputs(folder)
    results, _ = run_worker([c.argv for c in CASES.values()], folder, ranks=1)
    by_name = dict(zip(CASES, results, strict=True))
    return by_name.__getitem__


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_ends_with_one_line_before_weights_are_read(
    name: str, ended: Callable[[str], Result]
):
    result = ended(name)
    assert result.code == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert re.match(f"error: .*({CASES[name].says})", lines[0]), lines[0]
    assert result.read == []


@pytest.mark.slow
def test_a_real_process_ends_so_too(tmp_path: Path):
    done = launch([sys.executable, str(ROOT / SFT), "--bad"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: unknown flag --bad; see --help"]
    assert done.stdout == ""
