"""A stub of vLLM's HTTP interface that really samples: a tiny model, with adapters read by PEFT.

It keeps to what vLLM's server documents and its sources show: bodies and answers of `/v1/models`,
`/v1/completions` with ids in and out, `/v1/load_lora_adapter` and its counterpart, `/tokenize`,
`/sleep` and `/wake_up`; errors as `{"error": {"message": ...}}`.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from dschat.rlhf.vllm_adapters import AdapterSender
from dschat.rlhf.vllm_rollout import VLLMRollout
from dschat.rlhf.vllm_server import VLLMServer
from dschat.utils.module.adapter_write import AdapterOrigin
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers import tiny
from tests.helpers.adapters import ALONE

BASE = "tiny-base"


class RefusedError(Exception):
    """An answer other than 200: its status and message."""


def without_adapters(model: nn.Module) -> nn.Module:
    """The base that a server would have been started with."""
    base = type(model)(copy.deepcopy(model.config)).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    base.load_state_dict(state, strict=False)
    return base


class Stub:
    """What a server keeps; tests set `faults` by path to change an answer, or to raise."""

    def __init__(self, base: nn.Module, tokenizer: PreTrainedTokenizerBase, longest: int = 64):
        self.base, self.tokenizer, self.longest = base, tokenizer, longest
        self.adapters: dict[str, nn.Module] = {}
        self.asleep = False
        self.calls: list[tuple[str, Any]] = []
        self.faults: dict[str, Callable[[Any], Any]] = {}
        self._lock = threading.Lock()  # a PEFT model and torch's generator serve one at a time

    def answer(self, path: str, body: Any) -> Any:
        """JSON of a call.

        Raises:
            RefusedError: with status and message.
        """
        self.calls.append((path, body))
        known = {
            "/v1/models": self.models,
            "/v1/completions": self.completions,
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
            "/tokenize": self.tokenize,
            "/sleep?level=1": lambda _: self.set_asleep(True),
            "/wake_up": lambda _: self.set_asleep(False),
        }
        if path not in known:
            raise RefusedError(404, "Not Found")
        with self._lock:
            answer = known[path](body)
        return self.faults[path](answer) if path in self.faults else answer

    def models(self, _: Any) -> Any:
        cards = [{"id": BASE, "parent": None, "max_model_len": self.longest}]
        cards += [{"id": name, "parent": BASE} for name in self.adapters]
        return {"object": "list", "data": cards}

    def set_asleep(self, asleep: bool) -> None:
        self.asleep = asleep

    def load(self, body: dict[str, Any]) -> str:
        name, folder = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            raise RefusedError(400, f"The lora adapter '{name}' has already been loaded.")
        if self.asleep:
            raise RefusedError(500, "asleep")
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        if config["modules_to_save"] or config["use_dora"]:
            raise RefusedError(400, "vLLM only supports modules_to_save being None.")
        model = PeftModel.from_pretrained(copy.deepcopy(self.base), folder)
        self.adapters[name] = model.eval()
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> str:
        del self.adapters[body["lora_name"]]
        return "Success"

    def tokenize(self, body: dict[str, Any]) -> Any:
        tokens = self.tokenizer(body["prompt"], add_special_tokens=False).input_ids
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self.longest}

    @torch.no_grad()
    def completions(self, body: dict[str, Any]) -> Any:
        if self.asleep:
            raise RefusedError(500, "asleep")
        model = self.base if body["model"] == BASE else self.adapters.get(body["model"])
        if model is None:
            raise RefusedError(404, f"The model `{body['model']}` does not exist.")
        if max(body["prompt"]) >= self.base.config.vocab_size:
            raise RefusedError(400, "Token id is out of vocabulary")
        if len(body["prompt"]) + body["max_tokens"] > self.longest:
            raise RefusedError(
                400, f"This model's maximum context length is {self.longest} tokens."
            )
        if body["temperature"] == 0 and body["n"] > 1:
            raise RefusedError(400, "n must be 1 when using greedy sampling")
        choices = []
        for index in range(body["n"]):
            ids, told = self.sample(model, body, body["seed"] + index)
            told = {"token_logprobs": told, "tokens": [], "top_logprobs": [], "text_offset": []}
            choices.append({"index": index, "token_ids": ids, "logprobs": told})
        return {"object": "text_completion", "choices": choices}

    def sample(
        self, model: nn.Module, body: dict[str, Any], seed: int
    ) -> tuple[list[int], list[float]]:
        """One answer, a pass over the entire text for each token."""
        generator = torch.Generator().manual_seed(seed)
        ids, told, ends = [], [], body["stop_token_ids"]
        while len(ids) < body["max_tokens"]:
            logits = model(input_ids=torch.tensor([[*body["prompt"], *ids]])).logits[0, -1].float()
            if len(ids) < body["min_tokens"]:
                logits[ends] = -torch.inf
            logprobs = (logits / (body["temperature"] or 1.0)).log_softmax(-1)
            token = int(logprobs.argmax())
            if body["temperature"]:
                token = int(logprobs.exp().multinomial(1, generator=generator))
            ids.append(token)
            told.append(float(logprobs[token]))
            text = self.tokenizer.decode(ids)
            if token in ends or any(stop in text for stop in body["stop"]):
                break
        return ids, told


@contextmanager
def served(stub: Stub) -> Iterator[str]:
    """Serve a stub on a free port; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, body: Any) -> None:
            status, answer = 200, None
            try:
                answer = stub.answer(self.path, body)
            except RefusedError as refused:
                status, message = refused.args
                answer = {"error": {"message": message, "type": "BadRequestError", "code": status}}
                if message == "Not Found":  # of a path, not of a model: the web framework's words
                    answer = {"detail": message}
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self._answer(json.loads(self.rfile.read(length)) if length else None)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def vllm_rollout(model: nn.Module, url: str, folder: Path, **changes: Any) -> VLLMRollout:
    """An engine on one server, for a model with the adapters of `tiny.adapted`."""
    origin = AdapterOrigin(BASE, LoraConfig(lora_dim=4), tiny.VOCABULARY)
    servers = [VLLMServer(url, changes.pop("timeout", 60.0))]
    sender = AdapterSender(model, origin, folder, servers, ALONE, run=str(folder))
    return VLLMRollout(sender, tiny.byte_tokenizer(), **changes)
