"""Programs that load a model end in one line at a folder that holds no usable one, before data."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, T5Config

from tests.helpers import tiny
from tests.helpers.model_error_cases import EARLY, LATE, spoilt
from tests.helpers.steps import (
    DPO,
    PPO,
    PROMPT_EVALUATION,
    REWARD,
    REWARD_EVALUATION,
    SFT,
    preference_rows,
    run_worker,
    write_rows,
)


def commands(good: Path, bad: str) -> list[list[object]]:
    """Every program on the bad folder; data without a row would be the next complaint."""
    data = ["--data_path", "empty.jsonl"]
    roles = ["--actor_model_name_or_path", good, "--critic_model_name_or_path", bad]
    compared = ["--model_name_or_path_baseline", good, "--model_name_or_path_finetune", bad]
    return [
        [SFT, "--model_name_or_path", bad, *data, "--output_dir", "out"],
        [REWARD, "--model_name_or_path", bad, *data, "--output_dir", "out"],
        [REWARD_EVALUATION, "--model_name_or_path", bad, *data],
        [PROMPT_EVALUATION, *compared, "--prompts", "Hi", "--max_new_tokens", 1],
        [PPO, *roles, *data, "--output_dir", "out"],
        ["inference/chatbot.py", "--path", bad],
    ]


@pytest.mark.slow
def test_every_program_says_so_in_one_line(tmp_path: Path):
    good = tiny.save_llama_folder(tmp_path / "good")
    (tmp_path / "empty.jsonl").touch()
    cut, _ = spoilt(tmp_path / "cut", EARLY["cut"])
    encoder_decoder = tmp_path / "t5"  # with a tokenizer that ends every text, as T5's does
    tiny.save_llama_folder(encoder_decoder)
    T5Config().save_pretrained(encoder_decoder)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tiny.EOS)]
    )
    tokenizer.save_pretrained(encoder_decoder)
    plan = [*commands(good, cut), *commands(good, str(encoder_decoder))]
    results, printed = run_worker(plan, tmp_path, ranks=1)
    words = ["model.safetensors cannot be read"] * 6 + ["'t5' has encoder and decoder"] * 6
    for argv, result, expected in zip(plan, results, words, strict=True):
        assert result.code == 2, (argv, result.stderr[-2000:])
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and expected in lines[0], (argv, result.stderr[-2000:])
        assert "Traceback" not in result.stderr
    assert "tokenising" not in printed


@pytest.mark.slow
def test_a_family_that_sees_padding_is_found_before_anything_trains(tmp_path: Path):
    good = tiny.save_llama_folder(tmp_path / "good")
    write_rows(tmp_path / "data.jsonl", preference_rows(40, seed=0))
    small = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    for family, shape in (
        ("cpmant", {"num_attention_heads": 4, "dim_head": 8, "dim_ff": 48}),
        ("rwkv", {"attention_hidden_size": 32}),
    ):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small, **shape))
        model.save_pretrained(tmp_path / family)
        tiny.byte_tokenizer().save_pretrained(tmp_path / family)
    data = ["--data_path", "data.jsonl", "--data_output_path", "cache", "--dtype", "fp32"]
    steps = [
        [step, "--model_name_or_path", "cpmant", *data, "--output_dir", f"out-{place}"]
        for place, step in enumerate((SFT, REWARD, DPO))
    ]
    roles = ["--actor_model_name_or_path", "rwkv", "--critic_model_name_or_path", good]
    roles += ["--init_head_randomly", "--reward_function", "length", "--reward_length", 1, 9]
    roles += ["--max_prompt_seq_len", 32, "--max_answer_seq_len", 8]
    results, _ = run_worker(
        [*steps, [PPO, *roles, *data, "--output_dir", "out"]], tmp_path, ranks=1
    )
    for result, model in zip(results, 3 * ["cpmant"] + ["rwkv"], strict=True):
        assert result.code == 2, result.stderr[-2000:]
        assert f"error: model {model}: a text gets other values beside" in result.stderr
    assert not list(tmp_path.glob("out*/*.safetensors"))


@pytest.mark.slow
def test_nan_in_one_ranks_shard_stops_both(tmp_path: Path):
    """The last rank's shard is filled up with what was in memory, which is no NaN of the model."""
    spoilt(tmp_path / "nan", LATE["NaN"])
    odd = {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    tiny.save_llama_folder(tmp_path / "good", **odd)  # norms of 33, in shards of 17
    write_rows(tmp_path / "data.jsonl", preference_rows(40, seed=0))
    step = [SFT, "--data_path", "data.jsonl", "--max_seq_len", 64, "--zero_stage", 3]
    step += [
        "--data_output_path",
        "cache",
        "--max_steps",
        1,
        "--dtype",
        "fp32",
        "--output_dir",
        "out",
        "--model_name_or_path",
    ]
    results, _ = run_worker([[*step, "nan"], [*step, "good"]], tmp_path, ranks=2)
    assert [result.code for result in results] == [2, 0], [r.stderr[-2000:] for r in results]
    assert "error: model nan: NaN or infinity in 1 of its" in results[0].stderr
