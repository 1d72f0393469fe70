"""A page on this machine where one types, and two or three models answer at the same time."""

from __future__ import annotations

import importlib.util
import os
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from dschat.chat.bot import Chatbot, load_chatbot
from dschat.chat.conversation import Turn
from dschat.compare.page import LETTERS
from dschat.config.answering import CompareSettings
from dschat.config.programs import ChatSettings
from dschat.errors import UserError
from dschat.models.reward_head import check_language_model
from dschat.utils.printable import printable

HOST = "127.0.0.1"  # nobody else's machine reaches the page
NARROWEST = 300  # pixels of a column; on a telephone they stand one below the other
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}

Message = dict[str, str]  # `role` and `content`, as Gradio takes them
Turns = Sequence[Sequence[Turn]]  # of each model


def serve(settings: CompareSettings) -> None:
    """Load the models, and serve the page until Ctrl-C.

    Raises:
        UserError: Gradio is missing, the port is taken, or a model cannot answer.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("live: the page needs Gradio; run: pip install 'dschat[live]'")
    check_port(settings.port)
    for name in settings.models:
        check_language_model(name)
    bots = [load_chatbot(chat_settings(settings, name)) for name in settings.models]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    page = build(bots, settings.models)
    page.queue(default_concurrency_limit=1)
    page.launch(
        server_name=HOST,
        server_port=settings.port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        theme=gradio.themes.Default(**FONTS),
        footer_links=[],
    )
    print(f"type on http://{HOST}:{settings.port}; Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
        page.close()


def check_port(port: int) -> None:
    """Raise an error where another program listens already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port}: {error.strerror}; give another --port") from error


def chat_settings(settings: CompareSettings, name: str) -> ChatSettings:
    """The settings by which `dschat chat` would answer so."""
    sampling = settings.sampling
    return ChatSettings(
        path=name,
        max_new_tokens=sampling.max_answer_seq_len,
        temperature=0.0 if settings.greedy else sampling.temperature,
        top_p=sampling.top_p,
        seed=settings.seed,
        dtype=settings.dtype,
    )


def build(bots: Sequence[Chatbot], names: Sequence[str]) -> Any:
    """Lay the page out: a conversation for each model, one line to type on, two buttons."""
    import gradio

    with gradio.Blocks(title="dschat compare", analytics_enabled=False, fill_width=True) as page:
        turns = gradio.State([[] for _ in bots])
        with gradio.Row():
            talks = [
                gradio.Chatbot(
                    label=f"{letter}: {printable(name, keep='')}",
                    render_markdown=False,  # texts of models are shown, never rendered
                    min_width=NARROWEST,
                    height="42vh",
                    buttons=[],
                    feedback_options=None,
                )
                for letter, name in zip(LETTERS, names, strict=False)
            ]
        asked = gradio.Textbox(
            label="Your message: Enter sends it to every model", lines=1, autofocus=True
        )
        with gradio.Row():
            send = gradio.Button("Send", variant="primary", min_width=90)
            stop = gradio.Button("Stop", min_width=90)
            clear = gradio.Button("New conversation", min_width=170)

        def answer(text: str, before: list[list[Turn]]) -> Iterator[list[Any]]:
            for now in stream(bots, text.strip(), before):
                yield [*(messages(one) for one in now), now, ""]

        outputs = [*talks, turns, asked]
        running = gradio.on([asked.submit, send.click], answer, [asked, turns], outputs)
        empty: list[Any] = [*([] for _ in bots), [[] for _ in bots], ""]
        stop.click(None, cancels=running)
        clear.click(lambda: empty, None, outputs, cancels=running)
    return page


def messages(turns: Sequence[Turn]) -> list[Message]:
    """A conversation as the page shows it."""
    return [
        {"role": role, "content": printable(text)}
        for turn in turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]


def stream(bots: Sequence[Chatbot], text: str, before: Turns) -> Iterator[list[list[Turn]]]:
    """Ask every model at the same time; yield all conversations whenever one has grown.

    Closing the iterator ends the answers.
    """
    if not text:
        yield [list(turns) for turns in before]
        return
    pieces: queue.Queue[tuple[int, str | None]] = queue.Queue()
    ended = threading.Event()
    texts = [""] * len(bots)

    def ask(number: int) -> None:
        def show(piece: str) -> None:
            pieces.put((number, piece))
            if ended.is_set() and piece:
                raise KeyboardInterrupt  # as Ctrl-C in the terminal: the answer ends here

        try:
            bots[number].turns = list(before[number])
            bots[number].ask(text, show)
        except KeyboardInterrupt:
            pass
        except Exception as error:  # one model's failure is shown in its place
            pieces.put((number, f"\n(failed: {type(error).__name__}: {error})"))
        finally:
            pieces.put((number, None))

    threads = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(len(bots))]
    for thread in threads:
        thread.start()
    try:
        going = len(bots)
        while going:
            number, piece = pieces.get()
            going -= piece is None
            texts[number] += piece or ""
            yield [[*old, Turn(text, new)] for old, new in zip(before, texts, strict=True)]
    finally:
        ended.set()
        for thread in threads:
            thread.join()
