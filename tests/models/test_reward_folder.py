"""A saved reward model gives its scores in transformers and PEFT too, whatever its padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerBase,
)

from dschat.errors import UserError
from dschat.models import reward_folder
from dschat.models.causal_lm import create_hf_model
from dschat.models.reward_folder import reward_form, tell_reward_form
from dschat.models.reward_model import (
    RewardModel,
    create_critic_model,
    head_width,
    scores_at_end,
)
from dschat.models.save import save_hf_format
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers import tiny
from tests.helpers.adapters import ALONE, assert_equal, plan, save_base, with_adapter
from tests.helpers.families import FAMILIES, family_config, save_family
from tests.helpers.scores import noted_scores, scores_alone

TEXTS = ["Say hello. Hello!", "Count. One, two, three", "Hi."]  # of three lengths
LORA = LoraConfig(lora_dim=4, lora_module_name=("attn",))
SLOW = pytest.mark.slow
PADDINGS = [
    ("llama", "the end token"),
    ("gpt2", "the end token"),
    *(pytest.param(name, "own", marks=SLOW) for name in ("llama", "gpt2", "opt")),
    pytest.param("opt", "the end token", marks=SLOW),
]
FAMILY_CASES = [
    pytest.param(name, marks=() if name in ("granite", "olmoe") else SLOW) for name in FAMILIES
]


def padding_of(kind: str) -> PreTrainedTokenizerBase:
    """The byte tokenizer with padding of its own, with the end token's, or without any other."""
    tokenizer = tiny.byte_tokenizer()
    if kind != "own":
        tokenizer.pad_token = "</s>"
    if kind == "nothing else":  # neither `<pad>` nor `<s>` is special, and no token is unused
        backend = tokenizer.backend_tokenizer
        plain = type(tokenizer)(
            tokenizer_object=type(backend)(backend.model), eos_token="</s>", pad_token="</s>"
        )
        plain.backend_tokenizer.pre_tokenizer = backend.pre_tokenizer
        plain.backend_tokenizer.decoder = backend.decoder
        return plain
    return tokenizer


def expected_scores(model: RewardModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(B,): each text alone, with its end token, at its last position."""
    return scores_alone(model, [[*tokenizer(text)["input_ids"], tiny.EOS] for text in TEXTS])


@pytest.mark.parametrize(("name", "kind"), PADDINGS)
def test_other_readers_score_alike(tmp_path: Path, name: str, kind: str):
    """Merged and as an adapter, one text and a batch, by the code in the folder's note.

    Where the padding was the end token, transformers read the token before it.
    """
    tokenizer, out = padding_of(kind), tmp_path / "out"
    base = save_base(tmp_path / "base", name)
    tokenizer.save_pretrained(base)
    model = with_adapter(create_critic_model(base, tokenizer, torch.float32, init_head=True), LORA)
    expected = expected_scores(model, tokenizer)
    save_hf_format(model, tokenizer, out, ALONE, plan("both", base, LORA, out))
    for folder in (out, out / "adapter"):
        assert_equal(noted_scores(folder, TEXTS), expected)
        for text, score in zip(TEXTS, expected, strict=True):
            assert_equal(noted_scores(folder, [text]), score[None])
        ours = create_critic_model(str(folder), tokenizer, torch.float32).eval()
        assert_equal(expected_scores(ours, tokenizer), expected)
    assert tokenizer.pad_token == ("<pad>" if kind == "own" else "</s>")  # the run's own stays


def test_padding_that_could_be_nothing_else_is_left_out(tmp_path: Path, capfd):
    """Then transformers scores one text at a time, rightly, and refuses a batch."""
    tokenizer, out = padding_of("nothing else"), tmp_path / "out"
    base = save_base(tmp_path / "base", "llama")
    tokenizer.save_pretrained(base)
    tell_reward_form(base, tokenizer)
    assert "</s> ends answers and is the padding" in capfd.readouterr().out
    model = create_critic_model(base, tokenizer, torch.float32, init_head=True).eval()
    save_hf_format(model, tokenizer, out, ALONE)
    assert AutoConfig.from_pretrained(out).pad_token_id is None
    for text, score in zip(TEXTS, expected_scores(model, tokenizer), strict=True):
        assert_equal(noted_scores(out, [text]), score[None])
    with pytest.raises(ValueError, match="batch sizes > 1"):
        noted_scores(out, TEXTS)


def test_a_language_models_folder_never_says_that_its_end_is_padding(tmp_path: Path):
    """A classifier that PEFT builds on it would read the token before the end."""
    tokenizer, base = padding_of("the end token"), tmp_path / "base"
    tiny.tiny_llama(pad_token_id=tiny.EOS).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = create_hf_model(str(base), tokenizer, torch.float32)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (None, tiny.EOS)
    assert model.generation_config.pad_token_id == tiny.EOS  # what generation pads with


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_families_without_a_classifier_save_trunk_and_head(
    tmp_path: Path, tiny_tokenizer, name: str
):
    """score(before) == score(after load) == score(after merge), and what the note's code gives."""
    base, out = save_family(tmp_path / "base", name), tmp_path / "out"
    model = create_critic_model(base, tiny_tokenizer, torch.float32, init_head=True)
    model = with_adapter(model, LORA)
    expected = expected_scores(model, tiny_tokenizer)
    save_hf_format(model, tiny_tokenizer, out, ALONE, plan("both", base, LORA, out))
    with safe_open(out / "model.safetensors", "pt") as tensors:
        assert torch.equal(tensors.get_tensor("v_head.weight"), model.v_head.weight)
    assert type(AutoModel.from_pretrained(out)) is type(model.rwtransformer)
    for folder in (out, out / "adapter"):
        ours = create_critic_model(str(folder), tiny_tokenizer, torch.float32).eval()
        assert_equal(expected_scores(ours, tiny_tokenizer), expected)
    assert_equal(noted_scores(out, TEXTS), expected)
    assert "python -m dschat.merge" in (out / "adapter/REWARD_MODEL.md").read_text()
    save_hf_format(ours, tiny_tokenizer, out, ALONE)  # as the critic of step 3
    again = create_critic_model(str(out), tiny_tokenizer, torch.float32).eval()
    assert_equal(expected_scores(again, tiny_tokenizer), expected)


RWKV = AutoConfig.for_model("rwkv", **tiny.SHAPE, attention_hidden_size=32)


@pytest.mark.parametrize("config", [family_config("deepseek_v4"), RWKV])
def test_a_trunk_is_taken_out_of_its_language_model(tmp_path: Path, tiny_tokenizer, config):
    """transformers finds no final norm of DeepSeek V4 where it looks for the trunk alone.

    RWKV calls its head `head`.
    """
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            parameter.uniform_(0.5, 2.0)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    trunk = create_critic_model(str(tmp_path), tiny_tokenizer, torch.float32, init_head=True)
    expected = model.base_model.state_dict()
    found = trunk.rwtransformer.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


BERT = {"is_decoder": True, "num_hidden_layers": 1}
FORMS = {
    "llama": (LlamaConfig(num_hidden_layers=1), "LlamaForSequenceClassification"),
    "gpt2": (GPT2Config(n_layer=1), "GPT2ForSequenceClassification"),
    "opt": (OPTConfig(num_hidden_layers=1), "OPTForSequenceClassification"),
    "its classifier has a pooler": (BertConfig(**BERT), "BertModel"),
    "granite": (family_config("granite"), "GraniteModel"),
}


@pytest.mark.parametrize("name", FORMS)
def test_form_follows_what_transformers_has(tiny_tokenizer, name: str):
    config, expected = FORMS[name]
    form = reward_form(config, tiny_tokenizer)
    assert (form.saved_as.__name__, form.has_head) == (expected, "Sequence" in expected)
    assert form.config.pad_token_id == tiny.PAD and form.tokenizer.padding_side == "right"


def test_a_classifier_that_reads_another_token_is_not_used(tiny_tokenizer, monkeypatch):
    """Each class shows it on rows with and without padding."""

    class First(reward_folder._Positions):
        def forward(self, input_ids, *args, **options):
            output = super().forward(input_ids, *args, **options)
            output.last_hidden_state = output.last_hidden_state.flip(1)
            return output

    monkeypatch.setattr(reward_folder, "_Positions", First)
    assert not reward_form(LlamaConfig(num_hidden_layers=1), tiny_tokenizer).has_head


def test_start_says_what_the_folder_will_be(tmp_path: Path, tiny_tokenizer, capfd):
    tell_reward_form(save_base(tmp_path / "llama", "llama"), tiny_tokenizer)
    assert capfd.readouterr().out == ""
    tell_reward_form(save_base(tmp_path / "llama", "llama"), padding_of("the end token"))
    assert "</s> ends answers and is the padding" in capfd.readouterr().out
    tell_reward_form(save_family(tmp_path / "granite", "granite"), tiny_tokenizer)
    said = capfd.readouterr().out
    assert "takes a granite as it is; the folder will hold the trunk and, as v_head.weight" in said


def test_a_shape_without_a_bare_trunk_is_refused():
    """Llama 4 with images: transformers' AutoModel gives it with its output head."""
    from transformers import Llama4Config

    with pytest.raises(UserError, match=r"'llama4'.*no trunk without an output head for it"):
        RewardModel.from_config(Llama4Config())


@pytest.mark.parametrize("family", ["Bart", "Pegasus", "ProphetNet"])
def test_a_decoder_whose_trunk_has_an_encoder_is_refused(family: str):
    """Before its weights are said not to fit: those of the encoder are not there."""
    config = getattr(transformers, f"{family}Config")(is_encoder_decoder=False, is_decoder=True)
    with torch.device("meta"), pytest.raises(UserError, match="no trunk of its decoder alone"):
        RewardModel.from_config(config)


def test_a_config_that_tells_no_width_is_refused():
    with pytest.raises(UserError, match="'blt': its config has no hidden_size"):
        head_width(transformers.BltConfig())


@pytest.mark.parametrize("pad", [None, tiny.PAD, 5])
def test_scores_do_not_depend_on_the_padding(pad: int | None):
    """Ours come from the mask."""
    model = tiny.reward_model()
    ids, mask = tiny.padded(tiny.token_rows(3, seed=8))
    model.config.pad_token_id = pad
    with torch.no_grad():
        scores = scores_at_end(model(ids.masked_fill(~mask, tiny.EOS), mask), mask)
        assert_equal(scores, scores_at_end(model(ids, mask), mask))
