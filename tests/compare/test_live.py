"""The page where one types: models stream at the same time; a browser drives it."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dschat.chat.bot import load_chatbot
from dschat.chat.conversation import Turn
from dschat.compare import __main__ as program
from dschat.compare.live import chat_settings, check_port, messages, stream
from dschat.config.answering import CompareSettings
from dschat.errors import UserError
from tests.helpers.browser import ENTER, TAB, browser
from tests.helpers.launch import TIME_LIMIT
from tests.helpers.tiny import save_llama_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("live")
    for seed, name in enumerate("ab"):
        save_llama_folder(folder / name, seed=seed, max_position_embeddings=512)
    return [str(folder / name) for name in "ab"]


def settings_of(models: list[str], **more: object) -> CompareSettings:
    return CompareSettings.of(models=models, live=True, max_answer_seq_len=12, greedy=True, **more)


def test_every_model_answers_as_it_would_alone(models):
    settings = settings_of(models)
    alone, bots = ([load_chatbot(chat_settings(settings, n)) for n in models] for _ in range(2))
    first = [Turn("Hi", bot.ask("Hi", lambda piece: None)) for bot in alone]
    steps = list(stream(bots, "Hi", [[], []]))
    assert steps[-1] == [[turn] for turn in first] and first[0] != first[1]
    assert len(steps) > 3 and all(x[0].question == "Hi" for now in steps for x in now)
    second = [bot.ask("And?", lambda piece: None) for bot in alone]
    *_, last = stream(bots, "And?", steps[-1])
    assert [turns[1].answer for turns in last] == second
    assert list(stream(bots, "", last)) == [last]


def test_an_answer_that_nobody_waits_for_ends(models):
    settings = CompareSettings.of(models=models, live=True, max_answer_seq_len=400)
    bots = [load_chatbot(chat_settings(settings, name)) for name in models]
    answers = stream(bots, "Hi", [[], []])
    next(answers)
    answers.close()  # joins: hundreds of tokens later without the stop
    assert all(len(turn.answer) < 300 for bot in bots for turn in bot.turns)


def test_texts_cannot_steer(models):
    shown = messages([Turn("\x1b[2J", "\u202eevil")])
    assert shown[0] == {"role": "user", "content": r"\x1b[2J"}
    assert shown[1]["content"] == r"\u202eevil"


def test_what_is_missing_is_one_line(models, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"port \d+: Address already in use; give another"):
            check_port(taken.getsockname()[1])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs Gradio; run: pip install 'dschat\[live\]'"):
        program.main(["--live", *models])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_talks_to_both(models, tmp_path: Path, width):
    pytest.importorskip("gradio")
    port = free_port()
    words = ["--live", *models, "--greedy", "--max_answer_seq_len", "12", "--port", str(port)]
    command = [sys.executable, "-m", "dschat", "compare", *words]
    bots = [load_chatbot(chat_settings(settings_of(models), name)) for name in models]
    expected = [bot.ask("Hi", lambda piece: None).strip() for bot in bots]
    with browser(tmp_path, width, 844) as window:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        try:
            assert server.stdout is not None
            said = next(line for line in server.stdout if "http" in line)
            window.open(re.search(r"http://\S+(?=;)", said)[0])
            ready = "return document.activeElement.tagName"
            window.until(lambda: window.call(ready) == "TEXTAREA", "line to type on")
            window.press("Hi" + ENTER)  # no mouse: the line has the focus
            talks = "return [...document.querySelectorAll('[role=log]')].map(e => e.innerText)"

            def answered() -> bool:
                shown = [" ".join(text.split()) for text in window.call(talks)]
                wanted = [" ".join(messages([Turn("", x)])[1]["content"].split()) for x in expected]
                return len(shown) == 2 and all(w in s for w, s in zip(wanted, shown, strict=True))

            window.until(answered, f"answer of both, {expected}")
            wide, inner = window.call("return [document.documentElement.scrollWidth, innerWidth]")
            assert wide <= inner == width
            tops = "return [...document.querySelectorAll('[role=log]')]"
            tops += ".map(e => e.getBoundingClientRect().top)"
            assert (len(set(window.call(tops))) == 2) == (width == 390)  # below each other
            names = []
            for _ in range(4):
                window.press(TAB)
                names.append(window.call("return document.activeElement.innerText"))
            assert {"Send", "Stop", "New conversation"} <= set(names)
            foreign = "return performance.getEntriesByType('resource').map(e => e.name)"
            assert all(f":{port}/" in name for name in window.call(foreign))
            (tmp_path / f"live-{width}.png").write_bytes(window.picture())
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(TIME_LIMIT)
