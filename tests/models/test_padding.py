"""The token that a saved reward model pads with; models that see padding."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from dschat.errors import UserError
from dschat.models.padding import classifier_tokenizer
from dschat.models.padding_proof import prove_padding
from tests.helpers import tiny


def tokenizer_with(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """Byte-level, with the token of `“`'s first two bytes, these special ones, and end = pad."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "âĢ"])}
    backend = Tokenizer(models.BPE(vocabulary, [("â", "Ģ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (*special, "<end>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", **named
    )


BOS, UNK = {"bos_token": "<s>"}, {"unk_token": "<unk>"}
CASES = {
    "made for it": (tokenizer_with("<s>", "<unk>", "<|fim_pad|>", **BOS, **UNK), "<|fim_pad|>"),
    "reserved": (tokenizer_with("<s>", "<|reserved_7|>", **BOS), "<|reserved_7|>"),
    "bos": (tokenizer_with("<unk>", "<s>", "<tool>", **BOS, **UNK), "<s>"),
    "another special one": (tokenizer_with("<unk>", "<tool>", **UNK), "<tool>"),
    "unknown": (tokenizer_with("<unk>", **UNK), "<unk>"),
    "part of a character": (tokenizer_with(), "âĢ"),
    "one token for all, as in GPT-2": (
        tokenizer_with(bos_token="<end>", unk_token="<end>"),
        "âĢ",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_another_token_than_the_end_is_found(tmp_path, name: str):
    """One that is there already; the vocabulary and every text's ids stay."""
    tokenizer, expected = CASES[name]
    classifier = classifier_tokenizer(tokenizer)
    assert classifier.pad_token == expected and tokenizer.pad_token == "<end>"
    assert classifier.get_vocab() == tokenizer.get_vocab()
    classifier.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("plain", "“quoted” – â ÿ Ģ", "<end>"):
        assert saved(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert saved("“")["input_ids"][-1] != saved.pad_token_id  # no text ends in it


def test_padding_of_its_own_is_kept_on_the_right():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.padding_side = "left"
    classifier = classifier_tokenizer(tokenizer)
    assert (classifier.pad_token, classifier.padding_side) == ("<pad>", "right")
    assert tokenizer.padding_side == "left"


def sees_padding(family: str, **settings: object) -> nn.Module:
    """A causal LM of a family that padding reaches."""
    torch.manual_seed(0)
    small = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **small | {"num_attention_heads": 4} | settings)
    )


SEEN: dict[str, tuple[nn.Module, bool]] = {  # and whether padding behind the text alone is seen
    "cpmant": (sees_padding("cpmant", dim_head=8, dim_ff=48), True),
    "rwkv": (sees_padding("rwkv", attention_hidden_size=32), False),
    "bart": (
        sees_padding(
            "bart", d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48
        ),
        False,
    ),
}


@pytest.mark.parametrize("family", SEEN)
def test_a_model_that_sees_padding_is_found_out(family: str):
    model, is_seen_behind = SEEN[family]
    device, tokenizer = torch.device("cpu"), tiny.byte_tokenizer()
    message = rf"^model m: a text gets other values .* as {family} of transformers does not leave"
    if is_seen_behind:
        with pytest.raises(UserError, match=f"{message} padding after a text out"):
            prove_padding(model, tokenizer, device, "m")
    else:
        prove_padding(model, tokenizer, device, "m")
    with pytest.raises(UserError, match=f"{message} padding in front of a text out"):
        prove_padding(model, tokenizer, device, "m", left=True)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_others_pass_and_stay_as_they_were(name: str):
    model = tiny.ARCHITECTURES[name]().train()
    state = torch.get_rng_state()
    for left in (False, True):
        prove_padding(model, tiny.byte_tokenizer(), torch.device("cpu"), "m", left=left)
    assert model.training and torch.equal(torch.get_rng_state(), state)
