"""Conversations under a chat template, through all steps, the evaluations and chat."""

import json

import pytest
import torch
from tokenizers import AddedToken

from dschat.chat.bot import Chatbot
from dschat.config.programs import ChatSettings
from tests.helpers.steps import (
    PPO,
    PROMPT_EVALUATION,
    REWARD,
    REWARD_EVALUATION,
    SFT,
    Run,
    run_worker,
    write_rows,
)
from tests.helpers.tiny import byte_tokenizer, tiny_llama

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_tokenizer():
    """The byte tokenizer with ChatML, whose answers do not end with its eos."""
    tokenizer = byte_tokenizer()
    tokens = [AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.chat_template = CHATML
    del tokenizer.init_kwargs["prompt_format"]
    return tokenizer


def conversation(number: int, last: str) -> list[dict[str, str]]:
    texts = (f"add {number}", f"{number + 1}", "more", last)
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """SFT on messages, then pairs of message lists, then PPO, all without a flag for the format."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_llama(vocab_size=272, max_position_embeddings=192).save_pretrained(folder / "model")
    chat_tokenizer().save_pretrained(folder / "model")
    talks = [{"messages": conversation(n, f"{n + 2}")} for n in range(12)]
    pairs = [
        {"chosen": conversation(n, f"{n + 2}"), "rejected": conversation(n, "no")}
        for n in range(12)
    ]
    write_rows(folder / "talks.jsonl", talks)
    write_rows(folder / "pairs.jsonl", pairs)
    common = ["--data_split", "1", "--data_output_path", "cache", "--dtype", "fp32"]
    batch = ["--max_seq_len", "160", "--per_device_train_batch_size", "6", "--log_every", "1"]
    talk, pair = ["--data_path", "talks.jsonl"], ["--data_path", "pairs.jsonl"]
    models = ["--actor_model_name_or_path", "sft", "--critic_model_name_or_path", "reward"]
    compared = ["--model_name_or_path_baseline", "model", "--model_name_or_path_finetune", "sft"]
    lengths = ["--max_prompt_seq_len", "128", "--max_answer_seq_len", "4", "--max_steps", "1"]
    plan = [
        [SFT, "--model_name_or_path", "model", *talk, *common, *batch, "--output_dir", "sft"],
        [REWARD, "--model_name_or_path", "sft", *pair, *common, *batch, "--output_dir", "reward"],
        [PPO, *models, *pair, *common, *lengths, "--output_dir", "ppo"],
        [REWARD_EVALUATION, "--model_name_or_path", "reward", *pair, *common, "--show", "1"],
        [PROMPT_EVALUATION, *compared, "--prompts", "add 1", "--max_new_tokens", "2"],
        [REWARD, "--model_name_or_path", "sft", *pair, *common, "--prompt_format", "dschat"],
    ]
    plan[2] += ["--per_device_generation_batch_size", "6", "--num_warmup_steps", "0"]
    plan[3] += ["--max_seq_len", "160"]
    return Run(folder, *run_worker(plan, folder, ranks=1))


@pytest.mark.slow
def test_every_step_follows_the_format_that_was_stored(run: Run):
    assert [result.code for result in run.results] == [0, 0, 0, 0, 0, 2], run.results
    for name in ("sft", "reward", "ppo/actor", "ppo/critic"):
        settings = json.loads((run.folder / name / "tokenizer_config.json").read_text())
        assert (settings["prompt_format"], settings["eos_token"]) == ("chat", "<|im_end|>"), name
    for name in ("sft", "ppo/actor"):
        settings = json.loads((run.folder / name / "generation_config.json").read_text())
        assert settings["eos_token_id"] == chat_tokenizer().convert_tokens_to_ids("<|im_end|>")
    line = "prompt format chat (the tokenizer's chat template), answers end with '<|im_end|>'\n"
    assert run.printed.count(line) == 4
    assert "== <|im_start|>user\nadd 1<|im_end|>\n<|im_start|>assistant\n" in run.printed


@pytest.mark.slow
def test_rw_eval_shows_whole_turns(run: Run):
    shown = "<|im_start|>user\\nmore<|im_end|>\\n<|im_start|>assistant\\n'"
    assert shown in run.printed
    assert "'no<|im_end|>'" in run.printed


@pytest.mark.slow
def test_another_format_than_the_stored_is_refused(run: Run):
    message = run.results[-1].stderr
    assert message.startswith("error: --prompt_format dschat: ") and message.count("\n") == 1
    assert "was trained with the format 'chat'; leave the flag out" in message
    assert run.results[-1].read == []


def test_chat_speaks_the_format_and_stops_at_its_end():
    """The prompts that the chatbot gives are those that the steps trained on."""
    tokenizer = chat_tokenizer()
    model = tiny_llama(vocab_size=272, max_position_embeddings=192)
    bot = Chatbot(model, tokenizer, ChatSettings(path="x", temperature=0.0, max_new_tokens=9))
    script = tokenizer("Yes<|im_end|>never")["input_ids"]
    prompts, said = [], []

    def note(module, args, kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            prompts.append(tokenizer.decode(kwargs["input_ids"][0]))
            said.clear()

    def say(module, inputs, logits):
        forced = torch.full_like(logits, -100.0)
        forced[..., script[len(said)]] = 100.0
        said.append(script[len(said)])
        return forced

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    model.lm_head.register_forward_hook(say)
    talk = []
    for question in ("add 1", "more"):
        talk.append({"role": "user", "content": question})
        assert bot.ask(question, lambda piece: None) == "Yes"
        assert tokenizer.decode(said) == "Yes<|im_end|>"
        expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert prompts[-1] == expected
        talk.append({"role": "assistant", "content": "Yes"})
