"""A server with OpenAI's interface: its models, and answers that come in pieces.

The standard library is enough. Whatever goes wrong is one line, in which the key never stands.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from dschat.config.programs import KEY
from dschat.errors import UserError, brief, parse_json
from dschat.rlhf.vllm_server import message_of
from dschat.utils.addresses import THIS_MACHINE, may_hear_a_key

QUICK, PATIENCE = 30.0, 600.0  # seconds without a word: for the list of models, for an answer
LONGEST = 1 << 20  # bytes of an answer in one piece, or of one piece
MOST = 64 * LONGEST  # bytes of an answer in pieces, each of some hundred
SHOWN = 5  # names of models in a message
EVENT = b"data:"
LAST = {"choices": [{"finish_reason": "stop"}]}  # without text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nowhere: the key is meant for one address."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """A server at an address such as `http://localhost:8000/v1`; without a path `/v1` is added."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self.url = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self.key = os.environ.get(KEY) or None
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise UserError(f"{KEY} holds what no key has: a line break, or another character")
        self.keeps_key = self.key is not None and not may_hear_a_key(url)
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if parts.hostname in THIS_MACHINE:
            handlers.append(urllib.request.ProxyHandler({}))  # it needs no proxy
        self._opener = urllib.request.build_opener(*handlers)

    def models(self) -> list[str]:
        """Name the models that it serves.

        Raises:
            UserError: as `stream`.
        """
        with self._opened("models", None, QUICK) as response:
            try:
                return [str(card["id"]) for card in parse_json(_whole(response))["data"]]
            except (ValueError, KeyError, TypeError) as error:
                raise self._problem("lists no models; name one by --model") from error

    def only_model(self) -> str:
        """Name its model.

        Raises:
            UserError: as `stream`, or it has none, or several.
        """
        names = self.models()
        if len(names) != 1:
            more = ", ..." if len(names) > SHOWN else ""
            listed = ", ".join(names[:SHOWN]) or "none"
            raise self._problem(f"models: {listed}{more}; name one by --model")
        return names[0]

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[str]:
        """Send a request, and yield the answer's text as it comes.

        Args:
            path: `chat/completions` or `completions`. body: of the request.

        Raises:
            UserError: nobody answers, or not with success, or not to the end.
        """
        with self._opened(path, {**body, "stream": True}, PATIENCE) as response:
            ended = False
            for event in self._events(response):
                if isinstance(event, dict) and event.get("error"):
                    raise self._problem(self._without_key(message_of(json.dumps(event))))
                try:
                    piece, last = _piece(event)
                except (KeyError, TypeError, IndexError, AttributeError) as error:
                    raise self._problem("sends no answer as OpenAI's interface has it") from error
                ended |= last
                if piece:
                    yield piece
            if not ended:
                raise self._problem("ended the connection before the answer")

    def _events(self, response: Any) -> Iterator[Any]:
        """Yield the JSON of each piece; an answer in one piece is one."""
        try:
            if "text/event-stream" not in response.headers.get("Content-Type", ""):
                yield parse_json(_whole(response))
                return
            total = 0
            while line := response.readline(LONGEST):
                total += len(line)
                if len(line) == LONGEST:
                    raise self._problem("sends a piece of more than a megabyte")
                if total > MOST:
                    raise self._problem("sends an endless answer")
                if line.startswith(EVENT) and (data := line[len(EVENT) :].strip()):
                    if data == b"[DONE]":
                        yield LAST
                        return
                    yield parse_json(data.decode("utf-8", "replace"))
        except UserError:
            raise
        except ValueError as error:
            raise self._problem("sends what is no JSON; give the address of its API") from error
        except (OSError, http.client.HTTPException) as error:
            raise self._problem(f"ended the connection ({brief(error, with_type=True)})") from error

    @contextlib.contextmanager
    def _opened(self, path: str, body: Any, timeout: float) -> Iterator[Any]:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, */*"}
        if self.key is not None and not self.keeps_key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            response = self._opener.open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(path, error) from error
        except urllib.error.URLError as error:
            reason = error.reason
            words = reason if isinstance(reason, str) else brief(reason, with_type=True)
            raise self._problem(f"cannot be reached ({words})") from error
        except (OSError, http.client.HTTPException) as error:
            words = brief(error, with_type=True)
            raise self._problem(f"gives no answer ({words})") from error
        with response:
            yield response

    def _refused(self, path: str, error: urllib.error.HTTPError) -> UserError:
        if where := error.headers.get("Location"):
            return self._problem(f"leads to {where}; give that address if you trust it")
        try:
            text = error.read(LONGEST).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        words = f"{path} was refused ({error.code}): {self._without_key(message_of(text))}"
        if error.code in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
            kept = "; your key goes only to https, or to this machine" if self.keeps_key else ""
            words += kept or ("" if self.key else f"; put your key into {KEY}")
        elif path == "models":
            words += "; name one by --model"
        return self._problem(words)

    def _without_key(self, text: str) -> str:
        return text if self.key is None else text.replace(self.key, "***")

    def _problem(self, words: str) -> UserError:
        return UserError(f"{self.url}: {words}")


def _whole(response: Any) -> str:
    return str(response.read(LONGEST).decode("utf-8", "replace"))


def _piece(event: Any) -> tuple[str, bool]:
    """The text of a piece of a chat or a completion, and whether it is the last."""
    if not event["choices"]:  # some tell the number of tokens so
        return "", False
    choice = event["choices"][0]
    part = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
    text = part.get("content") or ""
    if not isinstance(text, str):
        raise TypeError(type(text).__name__)
    return text, choice.get("finish_reason") is not None or "message" in choice
