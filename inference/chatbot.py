"""Talk to a trained model folder, in the prompt format of its training data, or to a server.

    dschat chat output/step3-models/actor --max_new_tokens 256
    dschat chat http://localhost:8000/v1 --system "Answer in one sentence."

`clear` forgets the conversation, `quit` or the end of input leaves, Ctrl-C ends an answer. A
server has OpenAI's interface, as those of vLLM, llama.cpp and `transformers serve`; its key, where
it asks for one, is the environment variable OPENAI_API_KEY.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # of `inference`

    from dschat.config.cli import check_flags
    from dschat.config.programs import ChatSettings

    check_flags(ChatSettings, __doc__)

from collections.abc import Sequence

from dschat.chat.conversation import Talker
from dschat.config.cli import parse, run_cli
from dschat.config.programs import ChatSettings
from dschat.config.unused import tell_unused
from dschat.errors import UserError
from dschat.utils.printable import printable


def converse(chatbot: Talker) -> None:
    """Read questions and print answers until `quit` or the end of input.

    Raises:
        UserError: of an answer, where nobody types; a person sees the error and may go on.
    """

    def show(piece: str) -> None:
        print(printable(piece), end="", flush=True)

    while True:
        try:
            text = input("You: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "quit":
            return
        if text == "clear":
            chatbot.clear()
            print("(forgotten)")
        elif text:
            show(chatbot.opening)
            try:
                chatbot.ask(text, show)
            except UserError as error:
                if not sys.stdin.isatty():
                    print(flush=True)
                    raise
                print(f"\nerror: {printable(str(error), keep='')}", end="")
            print()


def main(argv: Sequence[str] | None = None) -> None:
    """Chat on the terminal."""
    settings = parse(ChatSettings, argv, __doc__)
    tell_unused(settings)
    chatbot, place = load(settings)
    print(f"{printable(place, keep='')}: 'clear' forgets, 'quit' leaves.")
    converse(chatbot)


def load(settings: ChatSettings) -> tuple[Talker, str]:
    """Load the folder's model, or find the server's; say which answers, and where."""
    if settings.is_server:
        from dschat.chat.remote import RemoteChatbot

        remote = RemoteChatbot(settings)
        for line in remote.remarks:
            print(line)
        return remote, f"{remote.model} at {remote.server.url}"
    from dschat.chat.bot import load_chatbot

    local = load_chatbot(settings)
    return local, f"{settings.path} on {local.model.device}"


if __name__ == "__main__":
    run_cli(main)
