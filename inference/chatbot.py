"""Talk to a trained model folder in the terminal, in the prompt format of the training data.

    python chat.py --path output/actor --temperature 0.7 --max_new_tokens 256

`clear` forgets the conversation, `quit` or the end of input leaves, Ctrl-C ends an answer.
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

from dschat.chat.bot import Chatbot, load_chatbot
from dschat.config.cli import parse, run_cli
from dschat.config.programs import ChatSettings
from dschat.config.unused import tell_unused
from dschat.utils.printable import printable


def converse(chatbot: Chatbot) -> None:
    """Read questions and print answers until `quit` or the end of input."""

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
            show(f"Assistant:{chatbot.form.opening}" if chatbot.has_turns else "")
            chatbot.ask(text, show)
            print()


def main(argv: Sequence[str] | None = None) -> None:
    """Chat on the terminal."""
    settings = parse(ChatSettings, argv, __doc__)
    tell_unused(settings)
    chatbot = load_chatbot(settings)
    path = printable(settings.path)
    print(f"{path} on {chatbot.model.device}: 'clear' forgets, 'quit' leaves.")
    converse(chatbot)


if __name__ == "__main__":
    run_cli(main)
