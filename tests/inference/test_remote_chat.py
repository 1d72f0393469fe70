"""Chat with a server of OpenAI's interface; the server is a stub on this machine."""

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dschat.chat import server
from dschat.chat.remote import RemoteChatbot
from dschat.chat.server import LONGEST
from dschat.config.cli import run_cli
from dschat.config.programs import ChatSettings
from dschat.errors import UserError
from inference.chatbot import main

KEY = "sk-secret"
MODELS = {"data": [{"id": "tiny"}]}


def chunk(text: str | None, **more) -> dict:
    return {"choices": [{"delta": {"content": text}, "finish_reason": None, **more}]}


def events(*values: object, done: bool = True) -> bytes:
    """Server-sent events, with a comment and other line ends, which their standard allows."""
    lines = [f"data: {json.dumps(value)}\n\n" for value in values]
    return "".join([": ping\r\n\r\n", *lines, *(["data:[DONE]\n\n"] if done else [])]).encode()


class Stub:
    """Answers by path: a status, a content type and bytes; every request is kept."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict | None, str | None]] = []
        self.answers: dict[str, tuple[int, str, bytes]] = {}
        self.headers: dict[str, str] = {}
        self.say("models", MODELS)
        self.stream("chat/completions", chunk("He"), chunk("llo"), chunk("", finish_reason="stop"))
        self.stream("completions", {"choices": [{"text": " time", "finish_reason": "length"}]})

    def say(self, path: str, value: object, status: int = 200) -> None:
        self.answers[path] = (status, "application/json", json.dumps(value).encode())

    def stream(self, path: str, *values: object, done: bool = True) -> None:
        self.answers[path] = (200, "text/event-stream; charset=utf-8", events(*values, done=done))

    @property
    def bodies(self) -> list[dict]:
        return [body for _, body, _ in self.asked if body is not None]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    made = Stub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, body: dict | None) -> None:
            made.asked.append((self.path, body, self.headers["Authorization"]))
            path = self.path.removeprefix("/v1/")
            status, kind, data = made.answers.get(path, (404, "text/plain", b"nothing\nhere"))
            self.send_response(status)
            for name, value in {"Content-Type": kind, **made.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    # A proxy would hear the key, and cannot reach this machine's own servers.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def bot(stub: Stub, **settings) -> RemoteChatbot:
    return RemoteChatbot(ChatSettings(path=stub.url, **settings))


def said(chatbot: RemoteChatbot, text: str = "Hi") -> str:
    pieces: list[str] = []
    answer = chatbot.ask(text, pieces.append)
    assert "".join(pieces) == answer
    return answer


def test_answers_stream_and_the_conversation_goes_along(stub: Stub):
    chatbot, pieces = bot(stub, system="Be brief.", max_new_tokens=9, temperature=0.0), []
    assert chatbot.ask("Hi", pieces.append) == "Hello" and pieces == ["He", "llo"]
    said(chatbot, "And?")
    first, second = stub.bodies
    assert [path for path, _, _ in stub.asked] == ["/v1/models", *["/v1/chat/completions"] * 2]
    assert first["model"] == "tiny" and first["stream"] is True
    assert (first["max_tokens"], first["temperature"], first["top_p"]) == (9, 0.0, 0.95)
    assert second["seed"] == first["seed"] + 1
    assert [(m["role"], m["content"]) for m in second["messages"]] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "And?"),
    ]
    chatbot.clear()
    said(chatbot, "Again")
    assert [m["content"] for m in stub.bodies[2]["messages"]] == ["Be brief.", "Again"]


def test_raw_texts_are_completed_and_not_remembered(stub: Stub):
    chatbot = bot(stub, raw=True)
    assert said(chatbot, "Once upon a") == " time" and chatbot.turns == []
    assert stub.bodies[0]["prompt"] == "Once upon a" and "messages" not in stub.bodies[0]


def test_a_server_that_does_not_stream(stub: Stub):
    answer = {"choices": [{"message": {"content": "Whole"}, "finish_reason": "stop"}]}
    stub.say("chat/completions", answer)
    assert said(bot(stub)) == "Whole"


def test_the_key_goes_along_and_is_never_shown(stub: Stub, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    stub.say("chat/completions", {"error": {"message": f"Incorrect key: {KEY}"}}, 401)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    with pytest.raises(SystemExit):
        run_cli(lambda: main([stub.url]))
    assert {key for _, _, key in stub.asked} == {f"Bearer {KEY}"}
    shown = "".join(capsys.readouterr())
    assert "chat/completions was refused (401): Incorrect key: ***" in shown and KEY not in shown
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\n")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds what no key has"):
        bot(stub)


def test_a_key_is_not_sent_where_others_can_read_it(stub: Stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("dschat.utils.addresses.THIS_MACHINE", ())
    chatbot = bot(stub)
    said(chatbot)
    assert {key for _, _, key in stub.asked} == {None}
    assert chatbot.remarks == [
        "OPENAI_API_KEY is not sent: the address is neither https nor on this machine"
    ]
    # An answer that leads elsewhere is not followed: the key was for this address.
    stub.headers["Location"] = "http://elsewhere/v1"
    stub.say("chat/completions", {}, 302)
    with pytest.raises(UserError, match="leads to http://elsewhere/v1; give that address"):
        said(chatbot)


@pytest.mark.parametrize(
    ("status", "value", "words"),
    [
        (
            400,
            {"error": {"message": "too\nlong"}},
            r"chat/completions was refused \(400\): too long",
        ),
        (401, {"detail": "no"}, "put your key into OPENAI_API_KEY"),
        (500, "broken", "chat/completions was refused .500.: .broken"),
        (200, {"choices": [{"message": {"content": ["x"]}}]}, "no answer as OpenAI's interface"),
        (200, ["x"], "no answer as OpenAI's interface"),
        (200, {"error": {"message": "out of memory"}}, "v1: out of memory"),
    ],
)
def test_what_goes_wrong_is_one_line_and_leaves_the_conversation(stub, status, value, words):
    chatbot = bot(stub)
    said(chatbot, "before")
    stub.say("chat/completions", value, status)
    with pytest.raises(UserError, match=words) as error:
        said(chatbot)
    assert "\n" not in str(error.value) and str(error.value).startswith(stub.url)
    assert [turn.question for turn in chatbot.turns] == ["before"]


def test_streams_that_break_off(stub: Stub):
    chatbot = bot(stub)
    for data, words in (
        (events(chunk("He"), done=False), "ended the connection before the answer"),
        (events(chunk("He"), {"error": "overloaded"}), "v1: overloaded"),
        (b"data: {\n\n", "sends what is no JSON"),
        (b"data: " + b"x" * LONGEST, "a piece of more than a megabyte"),
    ):
        stub.answers["chat/completions"] = (200, "text/event-stream", data)
        with pytest.raises(UserError, match=words):
            said(chatbot)
    assert chatbot.turns == []


def test_a_stream_without_end(stub: Stub, monkeypatch):
    """Also where its pieces say nothing, so that nobody sees them."""
    monkeypatch.setattr(server, "MOST", 2000)
    for text in ("He", ""):
        data = events(*[chunk(text)] * 100)
        stub.answers["chat/completions"] = (200, "text/event-stream", data)
        with pytest.raises(UserError, match="sends an endless answer"):
            said(bot(stub))


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(stub: Stub):
    chatbot = bot(stub)

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    assert chatbot.ask("Hi", interrupt) == "He"
    assert [turn.answer for turn in chatbot.turns] == ["He"]


def test_which_model(stub: Stub):
    stub.say("models", {"data": [{"id": f"m{n}"} for n in range(7)]})
    with pytest.raises(UserError, match=r"models: m0, m1, m2, m3, m4, \.\.\.; name one by --model"):
        bot(stub)
    stub.asked.clear()
    said(bot(stub, model="m6"))  # without asking for the list, which some servers lack
    assert [path for path, _, _ in stub.asked] == ["/v1/chat/completions"]
    stub.say("models", {"models": []})
    with pytest.raises(UserError, match="lists no models"):
        bot(stub)
    stub.say("models", "Internal Server Error", 500)
    with pytest.raises(UserError, match=r"models was refused .500.*; name one by --model"):
        bot(stub)
    stub.answers["models"] = (200, "text/html", b"<html>")
    with pytest.raises(UserError, match="lists no models"):
        bot(stub)


def test_a_session_on_the_terminal(stub: Stub, monkeypatch, capsys):
    stub.say("models", {"data": [{"id": "ti\x1bny"}]})
    stub.stream("chat/completions", chunk("\x1b[2Jred\r\u202e"), chunk(None, finish_reason="stop"))
    typed = io.StringIO("Hi\nclear\n\nquit\n")
    typed.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", typed)
    main([stub.url, "--dtype", "fp16"])
    out = capsys.readouterr().out
    assert f"ti\\x1bny at {stub.url}/v1: 'clear' forgets, 'quit' leaves." in out
    assert "Assistant: \\x1b[2Jred\\r\\u202e\nYou: (forgotten)" in out
    assert "--dtype does nothing: the server decides" in out
    stub.say("chat/completions", {"error": {"message": "bu\x1bsy"}}, 503)
    typed = io.StringIO("Hi\nquit\n")
    typed.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", typed)
    main([stub.url])  # who types may try again
    assert "error: " in (out := capsys.readouterr().out) and "bu\\x1bsy" in out


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://", "give an address such as http://localhost:8000/v1"),
        ("http://host:port/v1", "give an address such as"),
        ("http://[::1/v1", "give an address such as"),
        ("https://host/v1?key=1", "give an address such as"),
        ("https://me:word@host/v1", "holds a name or a password.*OPENAI_API_KEY"),
    ],
)
def test_what_is_no_address(url: str, words: str):
    with pytest.raises(UserError, match=f"^path.*{words}") as error:
        ChatSettings(path=url)
    assert "word@" not in str(error.value)
