"""The chatbot on a tiny random Llama whose next tokens are scripted."""

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dschat.chat.bot import Chatbot, _Answer, load_chatbot, pick_device, prompt_room
from dschat.chat.conversation import Turn, fit_conversation, format_conversation, settled_part
from dschat.config.cli import run_cli
from dschat.config.programs import ChatSettings
from dschat.errors import UserError
from dschat.models.save import save_hf_format
from dschat.text.formats import set_format
from dschat.utils.module.lora_config import LoraConfig
from inference.chatbot import main
from tests.helpers.adapters import ALONE, plan, with_adapter
from tests.helpers.launch import TIME_LIMIT

ROOT = Path(__file__).resolve().parents[2]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: <s> 0, </s> 1, then 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def tiny_llama(context: int = 128) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


class Scripted:
    """A chatbot whose model says `script`, token by token, and that notes every prompt."""

    def __init__(self, tokenizer, script: str, context: int = 128, **settings):
        self.tokenizer = tokenizer
        self.ids = tokenizer(script)["input_ids"]
        self.prompts: list[str] = []
        self.said = 0
        model = tiny_llama(context)
        model.lm_head.register_forward_hook(self._say)
        model.model.register_forward_pre_hook(self._note, with_kwargs=True)
        options = {"path": "x", "temperature": 0.0, "max_new_tokens": 40, **settings}
        self.chatbot = Chatbot(model, tokenizer, ChatSettings(**options))

    def _say(self, module, inputs, logits):
        forced = torch.full_like(logits, -100.0)
        forced[..., self.ids[self.said % len(self.ids)]] = 100.0
        self.said += 1
        return forced

    def _note(self, module, args, kwargs):
        ids = kwargs["input_ids"][0].tolist()
        if len(ids) > 1:
            self.prompts.append(self.tokenizer.decode(ids))

    def ask(self, text: str) -> tuple[str, list[str]]:
        pieces: list[str] = []
        self.said = 0
        return self.chatbot.ask(text, pieces.append), pieces


def test_conversation_has_the_format_of_the_training_data():
    turns = [Turn("Hi", " Hello!")]
    assert format_conversation([], "Hi") == "\n\nHuman: Hi\n\nAssistant:"
    assert format_conversation(turns, "Why?") == (
        "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"
    )


def test_fit_drops_the_oldest_turns_whole():
    turns = [Turn("a", " 1"), Turn("b", " 2")]

    def encode_text(text):
        return [0, *(ord(c) for c in text)]

    def fitted(max_len):
        return fit_conversation(turns, "c", encode_text, max_len, bos_id=0)

    whole = encode_text(format_conversation(turns, "c"))
    one = encode_text(format_conversation(turns[1:], "c"))
    none = encode_text(format_conversation([], "c"))
    assert fitted(None) == fitted(len(whole)) == whole
    assert fitted(len(whole) - 1) == fitted(len(one)) == one
    assert fitted(len(one) - 1) == none
    # Too long by itself: the left end goes, the leading token stays.
    assert fitted(5) == [0, *none[-4:]]


@pytest.mark.parametrize(
    ("text", "final", "shown"),
    [
        (" yes", False, " yes"),
        (" yes\n", False, " yes"),  # may begin the stop
        (" yes\n\nHu", False, " yes"),
        (" yes\n\nHu", True, " yes\n\nHu"),
        (" yes\n\nHuge", False, " yes\n\nHuge"),
        (" yes\n\nHuman: I", False, " yes"),
        (" yes\n\nHuman:", True, " yes"),
        (" caf\ufffd", False, " caf"),  # half a character
        (" caf\ufffd", True, " caf\ufffd"),
        ("", False, ""),
    ],
)
def test_settled_part(text, final, shown):
    assert settled_part(text, "\n\nHuman:", final) == shown


def test_answer_streams_and_ends_at_the_end_token(tokenizer):
    scripted = Scripted(tokenizer, " Hé 你!</s> never said")
    answer, pieces = scripted.ask("Hi")
    assert answer == " Hé 你!"
    assert "".join(pieces) == answer
    assert [p for p in pieces if p] == [" ", "H", "é", " ", "你", "!"]  # one at a time
    assert scripted.prompts == ["\n\nHuman: Hi\n\nAssistant:"]


def test_the_conversation_is_remembered_until_cleared(tokenizer):
    scripted = Scripted(tokenizer, " Yes.\n</s>")
    scripted.ask("A")
    scripted.ask("B")
    assert scripted.prompts[1] == "\n\nHuman: A\n\nAssistant: Yes.\n\nHuman: B\n\nAssistant:"
    scripted.chatbot.clear()
    scripted.ask("C")
    assert scripted.prompts[2] == "\n\nHuman: C\n\nAssistant:"


def test_a_model_that_plays_both_roles_is_stopped(tokenizer):
    scripted = Scripted(tokenizer, " ok\n\nHuman: and again\n\nAssistant: ok", max_new_tokens=60)
    answer, pieces = scripted.ask("A")
    assert answer == "".join(pieces) == " ok"
    assert scripted.said == len(" ok\n\nHuman:")  # not 60 tokens
    assert scripted.chatbot.turns == [Turn("A", " ok")]


def test_a_system_prompt_begins_every_conversation(tokenizer):
    scripted = Scripted(tokenizer, " 123</s>", context=80, max_new_tokens=10, system="Be </s>")
    for question in "ABC":
        scripted.ask(question)
    assert scripted.prompts[0] == format_conversation([], "A", system="Be </s>")
    assert scripted.prompts[0].startswith("Be </s>\n\nHuman: A")
    assert scripted.prompts[2] == format_conversation([Turn("B", " 123")], "C", system="Be </s>")
    raw = byte_tokenizer()
    set_format(raw, "raw")
    with pytest.raises(UserError, match="system: x learned from texts without turns; drop it"):
        Scripted(raw, "", system="Be brief")


def test_the_oldest_turns_leave_a_full_context(tokenizer):
    scripted = Scripted(tokenizer, " 12345</s>", context=80, max_new_tokens=10)
    for question in "ABCD":
        scripted.ask(question)
    # A turn is 29 characters and an open one 23: two turns and the question (81) exceed 70.
    assert scripted.prompts[-1] == format_conversation([Turn("C", " 12345")], "D")
    scripted.ask("x" * 100)
    assert scripted.prompts[-1] == format_conversation([], "x" * 100)[-70:]


def test_raw_text_goes_as_it_is_and_is_not_remembered(tokenizer):
    scripted = Scripted(tokenizer, " a\n\nHuman: b</s>", raw=True)
    assert scripted.ask("Once upon a time")[0] == " a\n\nHuman: b"
    scripted.ask("Then")
    assert scripted.prompts == ["Once upon a time", "Then"]
    assert scripted.chatbot.turns == []


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(tokenizer):
    scripted = Scripted(tokenizer, " endless")

    def interrupt(module, inputs, output):
        if scripted.said == 4:
            raise KeyboardInterrupt

    scripted.chatbot.model.lm_head.register_forward_hook(interrupt)
    assert scripted.ask("A")[0] == " en"
    assert scripted.chatbot.turns == [Turn("A", " en")]


def test_an_answer_keeps_its_leading_space_with_metaspace_tokenizers():
    words = {"<s>": 0, "</s>": 1, "\u2581Hi": 2, "\u2581yes": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer.decode([3]) == "yes"  # a text's first space is dropped
    pieces: list[str] = []
    answer = _Answer(tokenizer, [2], None, pieces.append)
    for ids in ([2], [3], [1]):
        answer.put(torch.tensor(ids))
    answer.end()
    assert answer.shown == "".join(pieces) == " yes"


def test_sampling_follows_the_seed(tokenizer):
    def sample(seed):
        chatbot = Chatbot(tiny_llama(256), tokenizer, ChatSettings(path="x", temperature=1.0))
        torch.manual_seed(seed)
        return chatbot.ask("Hi", lambda piece: None)

    assert sample(1) == sample(1) != sample(2)


def test_prompt_room():
    config = tiny_llama(context=64).config
    assert prompt_room(config, 24) == 40
    with pytest.raises(UserError, match=r"--max_new_tokens 64 leaves no room.*64 tokens"):
        prompt_room(config, 64)
    assert prompt_room(SimpleNamespace(), 24) is None  # ALiBi


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}],
)
def test_bad_settings_are_named(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"^{name} is "):
        ChatSettings(path="x", **wrong)


def test_unknown_device_is_named():
    with pytest.raises(UserError, match="--device nonsense"):
        pick_device("nonsense")


def test_terminal_session(tokenizer, tmp_path, monkeypatch, capsys):
    tiny_llama(256).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nclear\n"))  # then the input ends
    main([str(tmp_path), "--max_new_tokens", "5", "--device", "cpu", "--model", "x"])
    out = capsys.readouterr().out
    assert f"{tmp_path} on cpu: " in out
    assert "--model does nothing: it is of a server, and path is a folder" in out
    assert out.count("You: Assistant:") == 1  # the empty line is not asked
    assert out.count("You: ") == 4  # the empty line asks again
    assert "(forgotten)" in out


def test_a_folder_that_holds_an_adapter_alone(tokenizer, tmp_path):
    """Its base, with the adapter merged in, answers; the dtype is the base's own."""
    base, lora = tmp_path / "base", LoraConfig(lora_dim=2)
    model = tiny_llama().bfloat16()
    save_hf_format(model, tokenizer, base, ALONE)
    with_adapter(model, lora)
    for mode in ("merged", "adapter"):
        output = tmp_path / mode
        save_hf_format(model, tokenizer, output, ALONE, plan(mode, str(base), lora, output))
    options = {"temperature": 0.0, "max_new_tokens": 8, "dtype": "bf16", "device": "cpu"}
    adapted, merged, plain = (
        load_chatbot(ChatSettings(path=str(folder), **options))
        for folder in (tmp_path / "adapter", tmp_path / "merged", base)
    )
    answers = [bot.ask("Hello?", lambda piece: None) for bot in (adapted, merged, plain)]
    assert answers[0] == answers[1] != answers[2]
    assert adapted.max_prompt_len == 120


def test_quit_leaves(tokenizer, tmp_path, monkeypatch, capsys):
    tiny_llama(256).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("quit\nHi\n"))
    main(["--path", str(tmp_path), "--device", "cpu"])
    assert "Assistant:" not in capsys.readouterr().out


def test_missing_folder_is_one_line_and_code_2(tmp_path, capsys):
    missing = str(tmp_path / "missing")
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: main(["--path", missing]))
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert missing in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", ["chat.py", "inference/chatbot.py"])
def test_both_entry_points_run_from_elsewhere(script, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / script, "--path", "./missing"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_a_raw_model_gets_each_text_alone_and_names_of_tokens_as_letters(tokenizer):
    set_format(tokenizer, "raw")
    scripted = Scripted(tokenizer, " yes</s>")
    heard = []
    model = scripted.chatbot.model.model
    model.register_forward_pre_hook(
        lambda module, args, inputs: heard.append(inputs["input_ids"][0].tolist()), with_kwargs=True
    )
    for text in ("Once </s>", "there was"):
        scripted.ask(text)
    prompts = [ids for ids in heard if len(ids) > 1]
    assert [tokenizer.decode(ids) for ids in prompts] == ["Once </s>", "there was"]
    assert all(tokenizer.eos_token_id not in ids for ids in prompts)
