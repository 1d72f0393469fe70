"""The tokens whose rows train beside the adapters: named, or chosen by tokenizer and data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from dschat.data.datasets import PromptData
from dschat.data.report import DataReport
from dschat.data.stream import RowStream
from dschat.data.tokenise import FEATURES
from dschat.errors import UserError
from dschat.settings import Settings
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train.model_config import ModelConfig
from dschat.train.trainable_tokens import AUTO, asked_tokens, choose_tokens
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.token_rows import token_rows
from dschat.utils.optim_config import OptimizerConfig
from tests.helpers import tiny

IM_START = "<|im_start|>"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes after three special tokens, and two special tokens more."""
    made = tiny.byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": [IM_START, "<|tool|>"]})
    return made


def rows_of(phase: int, *rows: dict) -> datasets.Dataset:
    columns = {name: [row.get(name) for row in rows] for name in FEATURES[phase]}
    return datasets.Dataset.from_dict(columns, FEATURES[phase])


def data_of(phase: int, *rows: dict, streamed: bool = False) -> PromptData:
    evaluation = rows_of(phase, *rows)
    train = RowStream(lambda: iter(()), lambda *_: {}) if streamed else evaluation
    return PromptData(train, evaluation, DataReport(phase, (), 0, 0), "key")


def answered(ids: list[int], start: int) -> dict:
    return {"input_ids": ids, "trained": [start, len(ids)], "prompt_len": start, "length": len(ids)}


def test_named_tokens_are_looked_up_once(tokenizer):
    choice = asked_tokens(("</s>", IM_START, "2", "5"), tokenizer)
    texts = {2: "</s>", 259: IM_START, 5: tokenizer.convert_ids_to_tokens(5)}
    assert (choice.texts, choice.always) == (texts, True)
    assert choice.reasons({}) == dict.fromkeys(texts, "asked for")
    assert asked_tokens(("none",), tokenizer).texts == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("<im_start>", r"trainable_tokens '<im_start>': .* no such token; did you mean '<\|im_st"),
        ("261", "trainable_tokens 261: no such id; the tokenizer's are below 261"),
        ("-1", "trainable_tokens '-1': the tokenizer has no such token"),
    ],
)
def test_tokens_that_are_not_there_are_named(tokenizer, name: str, message: str):
    with pytest.raises(UserError, match=message):
        asked_tokens((name,), tokenizer)
    with pytest.raises(UserError, match=r"^actor_trainable_tokens "):
        asked_tokens((name,), tokenizer, "actor_")


def test_auto_takes_the_end_token_and_the_special_tokens_that_the_data_holds(tokenizer):
    data = data_of(1, answered([259, 50, 51, 52, 2], 3), answered([60, 61, 2], 1))
    choice = choose_tokens(AUTO, tokenizer, data)
    assert choice.texts == {2: "</s>", 259: IM_START}  # <|tool|> and <s> occur nowhere
    assert (choice.predicted, choice.added, choice.always) == ({2}, set(), False)
    answers = data_of(1, answered([50, 51, 259, 52, 2], 2))
    assert choose_tokens(AUTO, tokenizer, answers).predicted == {2, 259}


def test_auto_reads_rows_of_every_phase_and_a_streams_first_test_rows(tokenizer):
    pair = {"chosen_ids": [1, 5, 2], "rejected_ids": [260, 2], "prompt_len": 1, "length": 3}
    assert [*choose_tokens(AUTO, tokenizer, data_of(2, pair)).texts] == [1, 2, 260]
    prompt = {"prompt_ids": [259, 9], "length": 2}
    choice = choose_tokens(AUTO, tokenizer, data_of(3, prompt))
    assert ([*choice.texts], choice.predicted) == ([2, 259], {2})
    stream = data_of(1, answered([259, 50, 2], 1), streamed=True)
    assert [*choose_tokens(AUTO, tokenizer, stream).texts] == [2, 259]


def test_auto_knows_an_end_token_that_was_added_while_loading(tmp_path):
    tiny.byte_tokenizer().save_pretrained(tmp_path / "first")
    tokenizer = load_hf_tokenizer(str(tmp_path / "first"), add_eot_token=True, eot_token="<end>")
    data = data_of(1, answered([50, 259], 1))
    assert choose_tokens(AUTO, tokenizer, data).added == {259}
    tokenizer.save_pretrained(tmp_path / "second")  # a model that knows it
    tokenizer = load_hf_tokenizer(str(tmp_path / "second"), add_eot_token=True, eot_token="<end>")
    assert choose_tokens(AUTO, tokenizer, data).added == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable_tokens": ("auto", "</s>")}, "trainable_tokens is auto </s>: give auto, none"),
        ({"trainable_tokens": ("</s>",)}, r"without adapters \(lora_dim 0\) every row trains"),
        (
            {"trainable_tokens": ("2",), "lora": LoraConfig(lora_dim=2), "train_base": True},
            "with train_base_model every row trains; drop trainable_tokens",
        ),
    ],
)
def test_settings_that_contradict_stop(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        ModelConfig(**options)
    assert issubclass(ModelConfig, Settings)


def told(capsys: pytest.CaptureFixture) -> Iterator[str]:
    return iter(capsys.readouterr().out.splitlines())


def test_what_trains_is_said_with_its_reason(capsys, tokenizer):
    model, lora = tiny.tiny_llama(), LoraConfig(lora_dim=2)
    config = ModelConfig(
        lora=lora, tokens=choose_tokens(AUTO, tokenizer, data_of(1, answered([5, 2], 1)))
    )
    assert token_rows(config.apply(model)) == {} and [*told(capsys)] == []
    rates = OptimizerConfig(trainable_tokens_learning_rate=1e-3)
    replace(config, optimizer=rates).apply(tiny.tiny_llama())
    line = "trainable_tokens_learning_rate does nothing: no rows of tokens train"
    assert [*told(capsys)] == [line]
    model = tiny.tiny_llama()
    model.lm_head.weight.data[100:110] = model.lm_head.weight.data[2] * 1.5
    config.apply(model)
    assert [*token_rows(model)] == ["model.embed_tokens", "lm_head"]
    reason = "'</s>' (2: its row of lm_head is like 10 others)"
    assert next(told(capsys)) == f"trainable tokens in model.embed_tokens and lm_head: {reason}"
    names = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B", "lora_token_rows"}
    adapted = LoraConfig(lora_dim=2, lora_module_name=("all-linear", "lm_head"))
    model = tiny.tiny_llama()
    model.model.embed_tokens.weight.data[100:110] = model.model.embed_tokens.weight.data[2]
    ModelConfig(lora=adapted, tokens=config.tokens).apply(model)
    assert token_rows(model) == {}
    line = next(told(capsys))
    assert line.startswith("advice: '</s>' (2: ") and "lm_head (LoRALinear) has an adapter" in line
