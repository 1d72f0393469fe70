"""The prompt format of a model: chosen, stored with its tokenizer, followed, contradicted."""

import itertools
import json
import resource
import signal
import subprocess
import sys
import threading

import pytest
from transformers import AutoTokenizer

from dschat.errors import UserError
from dschat.text import chat_template
from dschat.text.conversations import Turn
from dschat.text.encoding import encode, tokenizer_fingerprint
from dschat.text.formats import CONFIG_KEY, choose_format, describe_format, set_format
from dschat.text.tokenizer import check_same_tokenizer, load_hf_tokenizer
from dschat.utils import bounded
from tests.helpers.bpe import byte_tokenizer, space_tokenizer
from tests.helpers.launch import ROOT
from tests.text.templates import FAMILIES, THINKING, Family, with_template

ASKED = (Turn("user", "hi"),)
TALK = (*ASKED, Turn("assistant", "we"), Turn("user", "lo"))


def test_default_is_dschat_without_a_template_and_chat_with_one(byte_tokenizer):
    assert choose_format(byte_tokenizer).name == "dschat"
    assert choose_format(with_template(byte_tokenizer, FAMILIES["chatml"])).name == "chat"


def test_a_choice_changes_nothing_and_a_set_format_is_chosen_again(byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, FAMILIES["chatml"])
    before = dict(tokenizer.init_kwargs), tokenizer.eos_token
    for name in ("chat", "dschat", None):
        choose_format(tokenizer, name)
    assert (dict(tokenizer.init_kwargs), tokenizer.eos_token) == before
    set_format(tokenizer, "dschat")
    assert choose_format(tokenizer).name == "dschat" and tokenizer.eos_token == before[1]


def test_format_and_end_token_are_saved_with_the_tokenizer(byte_tokenizer, tmp_path):
    tokenizer = with_template(byte_tokenizer, FAMILIES["chatml"])
    for name, end in (("dschat", "<end>"), ("chat", "<|im_end|>")):
        set_format(tokenizer, name, teaches=True)
        tokenizer.save_pretrained(tmp_path / name)
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert (settings[CONFIG_KEY], settings["eos_token"]) == (name, end)
        again = load_hf_tokenizer(str(tmp_path / name))
        assert (set_format(again).name, again.eos_token) == (name, end)
        # Without this package the folder is an ordinary one.
        assert AutoTokenizer.from_pretrained(tmp_path / name).eos_token == end


def test_another_format_is_for_the_step_that_teaches_it(byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, FAMILIES["chatml"])
    set_format(tokenizer, "dschat")
    assert set_format(tokenizer, "dschat").name == "dschat"
    with pytest.raises(UserError, match=r"--prompt_format chat: .*was trained with .*'dschat'"):
        set_format(tokenizer, "chat")
    form = set_format(tokenizer, "chat", teaches=True)
    assert form.name == "chat" == set_format(tokenizer).name
    assert describe_format(form, tokenizer, "dschat") == (
        "prompt format chat (the tokenizer's chat template), answers end with '<|im_end|>'; "
        "the model came with dschat"
    )
    assert "came with" not in describe_format(form, tokenizer, None)


def test_what_cannot_be_is_refused(byte_tokenizer):
    with pytest.raises(UserError, match=r"has no chat template; .*--prompt_format dschat"):
        set_format(byte_tokenizer, "chat")
    tokenizer = with_template(byte_tokenizer, FAMILIES["chatml"])
    with pytest.raises(UserError, match=r"ends answers with '<\|im_end\|>'; leave --add_eot_token"):
        set_format(tokenizer, end_is_given=True)
    tokenizer.eos_token = "<|im_end|>"
    assert set_format(tokenizer, end_is_given=True).name == "chat"
    tokenizer.init_kwargs[CONFIG_KEY] = "alpaca"
    with pytest.raises(UserError, match=r"prompt_format in tokenizer_config\.json is 'alpaca'"):
        set_format(tokenizer)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system turns\\nat all') }}", r"refuses .*\(no system turns\)"),
        ("{% for m in messages %}{{ m['text'].x }}{% endfor %}", "refuses the conversation"),
    ],
)
def test_a_template_that_raises_is_one_line(template, words, byte_tokenizer):
    with pytest.raises(UserError, match=words) as caught:
        set_format(with_template(byte_tokenizer, Family(template, "")))
    assert "\n" not in str(caught.value)


LOOP = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "limits", "words"),
    [
        (
            LOOP,
            {"_SECONDS": 0.2},
            r"takes more than 0\.2 s for a conversation of 8 characters; fix",
        ),
        ("{{ x.a[" + LOOP, {}, "refuses the conversation"),  # cannot be compiled
        (LOOP, {"_BYTES": 1e6}, r"takes more than 0\.001 GB of memory for a conversation of 8"),
        ("{{ ('a' * 90000000000)|length }}", {}, "takes more than 2 GB of memory for"),
        ("{{ ('a' * 4000000000)|length }}", {}, "takes more than 2 GB of memory for"),
        ("{{ '%4000000000d' % 1 }}", {}, "takes more than 2 GB of memory for"),
        ("{{ ('b' * 99999).replace('b', 'b' * 99999) }}", {}, "takes more than 2 GB of memory"),
        ("{{ 'a' * 2000000 }}", {}, "makes 2,000,000 characters of a conversation of 8; fix or"),
    ],
)
def test_a_template_without_end_is_one_line(template, limits, words, byte_tokenizer, monkeypatch):
    for name, limit in limits.items():
        monkeypatch.setattr(chat_template, name, limit)
    if "_BYTES" in limits:  # else what other tests held counts
        monkeypatch.setattr(bounded, "peak_resident", itertools.count(step=10**6).__next__)
    handler = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(UserError, match=words):
        set_format(with_template(byte_tokenizer, Family(template, "")))
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert signal.getsignal(signal.SIGVTALRM) is handler


# Two lists of one form, each of the same list twice, and so on: compared in one operation of C.
ENDLESS = (
    "{% set ns = namespace(x=[1], y=[1]) %}{% for _ in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}"
)


def test_an_operation_without_end_ends_the_process():
    code = (
        "from dschat.text import chat_template; chat_template._SECONDS = 0.1\n"
        "from tests.helpers.bpe import byte_tokenizer; tokenizer = byte_tokenizer()\n"
        f"tokenizer.chat_template = {ENDLESS!r}\n"
        "chat_template.template_end(tokenizer)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    line = "error: an operation of the chat template does not end; fix the template or use "
    assert done.stderr.strip().splitlines() == [line + "--prompt_format dschat"]


def test_memory_is_free_again_after_a_template(byte_tokenizer):
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match="2 GB"):
        set_format(with_template(byte_tokenizer, Family("{{ ('a' * 9000000000)|length }}", "")))
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_long_row_and_another_thread_are_no_runaways(byte_tokenizer):
    form = set_format(with_template(byte_tokenizer, FAMILIES["chatml"]))
    question, texts = "why? " * 400_000, []
    thread = threading.Thread(target=lambda: texts.append(form.prompt(question)))
    thread.start()
    thread.join()
    assert [form.prompt(question)] == texts and len(texts[0]) > 2_000_000


def test_a_template_that_changes_what_is_said_is_refused(byte_tokenizer):
    family = FAMILIES["zephyr"]
    shouting = Family(family.template.replace("m['content']", "m['content'] | lower"), family.end)
    form = set_format(with_template(byte_tokenizer, FAMILIES["zephyr"]))
    byte_tokenizer.chat_template = shouting.template
    assert form.answer(ASKED, form.prompt(ASKED), "we") == "we"
    with pytest.raises(UserError, match=r"changes its text \(answer 'We'\)"):
        form.answer(ASKED, form.prompt(ASKED), "We")


def test_a_prompt_that_ends_in_an_answer_is_refused_under_chat(byte_tokenizer):
    form = set_format(with_template(byte_tokenizer, FAMILIES["zephyr"]))
    for prompt in ("\n\nHuman: hi\n\nAssistant: Sure,", ""):
        with pytest.raises(UserError, match="prompt ends inside an answer, or is empty"):
            form.prompt(prompt)


def test_dschat_text_of_turns(byte_tokenizer):
    form = set_format(byte_tokenizer)
    prompt = form.prompt((Turn("system", "Be kind."), *TALK))
    assert prompt == "Be kind.\n\nHuman: hi\n\nAssistant: we\n\nHuman: lo\n\nAssistant:"
    assert form.answer(TALK, prompt, "so") == form.answer(TALK, prompt, " so") == " so"
    # A transcript is taken as it stands, other text is one question.
    said = " Human: Once\n\nAssistant:"
    assert form.prompt(said) == said and form.answer(said, said, "upon") == "upon"
    assert form.prompt(" Once") == "\n\nHuman: Once\n\nAssistant:"
    assert form.answer(" Once", "", "upon") == " upon"
    assert "".join(form.earlier(prompt)) == prompt and len(form.earlier(prompt)) == 3


def test_the_set_is_tokenised_anew_for_another_format_or_template(byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, FAMILIES["chatml"])
    prints = set()
    for name, template in (("dschat", None), ("chat", None), ("chat", THINKING.template)):
        tokenizer.eos_token = "<|im_end|>"
        tokenizer.chat_template = template or tokenizer.chat_template
        set_format(tokenizer, name, teaches=True)
        prints.add(tokenizer_fingerprint(tokenizer))
    assert len(prints) == 3


def test_models_of_one_run_share_a_format(byte_tokenizer, tmp_path):
    tokenizer = with_template(byte_tokenizer, FAMILIES["chatml"])
    tokenizer.save_pretrained(tmp_path / "plain")
    set_format(tokenizer, "dschat")
    tokenizer.save_pretrained(tmp_path / "dschat")
    set_format(tokenizer, "chat", teaches=True)
    tokenizer.save_pretrained(tmp_path / "chat")
    check_same_tokenizer(tokenizer, str(tmp_path / "plain"))
    check_same_tokenizer(tokenizer, str(tmp_path / "chat"))
    with pytest.raises(UserError, match=r"trained with the prompt format 'dschat', but .*'chat'"):
        check_same_tokenizer(tokenizer, str(tmp_path / "dschat"))
    tokenizer.chat_template = THINKING.template
    with pytest.raises(UserError, match="its chat template is not that of"):
        check_same_tokenizer(tokenizer, str(tmp_path / "chat"))


@pytest.mark.parametrize("make", [byte_tokenizer, space_tokenizer])
def test_a_folder_of_the_dschat_format_has_a_template_that_writes_the_same_ids(make, tmp_path):
    tokenizer = make()
    plain = tokenizer_fingerprint(make())
    form = set_format(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    talk = (Turn("system", "Be kind."), *TALK)
    for turns in (ASKED, TALK, talk, (Turn("user", "\n spaced"),)):
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        told = other.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert [told] == encode(tokenizer, [form.prompt(turns)]), turns
    answered = other.apply_chat_template([*messages, {"role": "assistant", "content": "we"}])
    assert answered["input_ids"][-1] == tokenizer.eos_token_id
    again = load_hf_tokenizer(str(tmp_path))
    assert set_format(again).name == "dschat"
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer) == plain


def test_other_formats_and_templates_stay_as_they_are(byte_tokenizer, monkeypatch):
    set_format(byte_tokenizer, "raw")
    assert byte_tokenizer.chat_template is None
    tokenizer = with_template(byte_tokenizer, FAMILIES["chatml"])
    set_format(tokenizer, "dschat", teaches=True)
    assert tokenizer.chat_template == FAMILIES["chatml"].template
    # One that would write other ids than training's is left out.
    monkeypatch.setattr("dschat.text.own_template.TEMPLATE", "{{ messages[0]['content'] }}")
    tokenizer = space_tokenizer()
    set_format(tokenizer)
    assert tokenizer.chat_template is None
