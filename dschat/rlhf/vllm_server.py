"""One server of vLLM, asked over HTTP: its models, adapters, completions, and its sleep.

The standard library is enough: nothing of vLLM is imported, which runs in an environment of its
own. Whatever goes wrong is one line that names the server.
"""

from __future__ import annotations

import http.client
import json
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dschat.errors import UserError, brief

SHOWN = 300  # characters of a server's own message
KEY = "VLLM_API_KEY"  # environment variable of the server's --api-key, where it has one
HINTS = {  # by path, where the server knows no such address
    "/v1/load_lora_adapter": "start it with --enable-lora and "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
    "/sleep": "start it with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1, or drop vllm_sleep",
}
HINTS |= {"/wake_up": HINTS["/sleep"]}


@dataclass(frozen=True)
class VLLMServer:
    """A server at an address; each call opens a connection, so that threads may share it.

    Attributes:
        timeout: seconds to wait for an answer.
    """

    url: str
    timeout: float

    def get(self, path: str) -> Any:
        """Ask for JSON.

        Raises:
            UserError: as `post`.
        """
        return self._asked("GET", path, None)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send JSON; return the answer's JSON, or its text where it is none.

        Raises:
            UserError: nobody answers, not in time, or not with success.
        """
        return self._asked("POST", path, body)

    def _asked(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if KEY in os.environ:
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        data = None if body is None else json.dumps(body)
        try:
            connection.request(method, parts.path.rstrip("/") + path, data, headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except TimeoutError as error:
            raise self._problem(
                f"no answer to {path} within {self.timeout:g} s; see the server's log, or raise "
                "vllm_timeout"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._problem(
                f"cannot be reached for {path} ({brief(error, with_type=True)}); see whether the "
                "server runs there"
            ) from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise self._refused(path, response.status, text)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text

    def _refused(self, path: str, status: int, text: str) -> UserError:
        place = path.partition("?")[0]
        if status == http.client.NOT_FOUND and place in HINTS and "error" not in text:
            return self._problem(f"has no {place}; {HINTS[place]}")
        return self._problem(f"{place} was refused ({status}): {message_of(text)}")

    def _problem(self, words: str) -> UserError:
        return UserError(f"vllm_url {self.url}: {words}")

    def model(self) -> tuple[str, int | None]:
        """Name the model that it serves, and the tokens of its longest text where it tells them.

        Raises:
            UserError: as `post`, or something else answers there.
        """
        try:
            cards = self.get("/v1/models")["data"]
            base = next(card for card in cards if not card.get("parent"))
            return str(base["id"]), base.get("max_model_len")
        except (KeyError, TypeError, AttributeError, StopIteration) as error:
            raise self._problem("/v1/models names no model; give a server of vLLM") from error

    def tokens_of(self, text: str, model: str) -> list[int]:
        """Tokenise as the server does, without special tokens.

        Raises:
            UserError: as `post`.
        """
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        answer = self.post("/tokenize", body)
        if not isinstance(answer, dict) or not isinstance(answer.get("tokens"), list):
            raise self._problem("/tokenize returns no tokens; give a server of vLLM")
        return answer["tokens"]

    def load_adapter(self, name: str, folder: str) -> None:
        """Load an adapter into the server from a folder that it sees."""
        self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter."""
        self.post("/v1/unload_lora_adapter", {"lora_name": name})

    def sleep(self) -> None:
        """Put the server to sleep: it frees its memory; level 1 keeps weights in the host's memory.

        Level 2 would drop the weights of the base, which adapters do not restore.
        """
        self.post("/sleep?level=1")

    def wake_up(self) -> None:
        """Wake the server, which takes its memory again; one that is awake stays so."""
        self.post("/wake_up")

    def complete(self, request: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
        """Sample `n` answers to one prompt of token ids.

        Returns:
            Each answer's ids and their log-probabilities.

        Raises:
            UserError: as `post`, or the answers are not what was asked for.
        """
        answer = self.post("/v1/completions", request)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [(c["token_ids"], c["logprobs"]["token_logprobs"]) for c in choices]
            fits = all(
                0 < len(ids) <= request["max_tokens"] and len(ids) == len(logprobs)
                for ids, logprobs in found
            )
        except (KeyError, TypeError) as error:
            raise self._problem(
                "/v1/completions returns no token ids with log-probabilities; take a version of "
                "vLLM that has return_token_ids"
            ) from error
        if len(found) != request["n"] or not fits:
            counts = "; ".join(f"{len(ids)} and {len(logprobs)}" for ids, logprobs in found)
            raise self._problem(
                f"/v1/completions returns {len(found)} answers (ids and log-probabilities: "
                f"{counts or 'none'}), where {request['n']} of up to {request['max_tokens']} ids "
                "were asked for"
            )
        return found


def message_of(text: str) -> str:
    """Find a server's own words in its answer, on one line."""
    try:
        found = json.loads(text)
        inner = found.get("error", found)
        message = inner.get("message") if isinstance(inner, dict) else inner
    except (ValueError, AttributeError, RecursionError):
        message = None
    return " ".join(str(message or text or "no reason given").split())[:SHOWN]
