"""A conversation with a server that has OpenAI's interface; it stays in this process's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dschat.chat.conversation import Turn
from dschat.chat.server import Server
from dschat.config.programs import KEY, ChatSettings


class RemoteChatbot:
    """One of a server's models, and the conversation so far.

    Raises:
        UserError: as `Server.only_model`.
    """

    def __init__(self, settings: ChatSettings):
        self.settings, self.server = settings, Server(settings.path)
        self.model = settings.model or self.server.only_model()
        self.turns: list[Turn] = []
        self._asked = 0

    @property
    def opening(self) -> str:
        """What stands on a screen before an answer."""
        return "" if self.settings.raw else "Assistant: "

    @property
    def remarks(self) -> list[str]:
        """What somebody should know before the first question."""
        if not self.server.keeps_key:
            return []
        return [f"{KEY} is not sent: the address is neither https nor on this machine"]

    def clear(self) -> None:
        """Forget the conversation."""
        self.turns = []

    def ask(self, text: str, show: Callable[[str], None]) -> str:
        """Return the answer to a text, handing its pieces to `show` as they come.

        Ctrl-C ends the answer; what was said stays in the conversation.

        Raises:
            UserError: of the server; the conversation stays as it was.
        """
        said: list[str] = []
        try:
            for piece in self._pieces(text):
                said.append(piece)
                show(piece)
        except KeyboardInterrupt:
            pass
        answer = "".join(said)
        if not self.settings.raw:
            self.turns.append(Turn(text, answer))
        return answer

    def _pieces(self, text: str) -> Iterator[str]:
        settings = self.settings
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed + self._asked,  # another draw for each question
        }
        self._asked += 1
        if settings.raw:
            return self.server.stream("completions", body | {"prompt": text})
        messages = [{"role": "system", "content": settings.system}] if settings.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        messages.append({"role": "user", "content": text})
        return self.server.stream("chat/completions", body | {"messages": messages})
