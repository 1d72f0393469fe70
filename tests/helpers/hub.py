"""Stubs of the Hub: one in place of its client's class, and one that its client talks to."""

from __future__ import annotations

import base64
import fnmatch
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dschat.models.hub_push  # noqa: F401  (now: what it imports needs the real HfApi)


class Hub:
    """Repositories by name, each with its files; `private` as they were made."""

    def __init__(self):
        self.private: dict[str, bool] = {}
        self.files: dict[str, set[str]] = {}
        self.stops: set[str] = set()  # who pushes there presses Ctrl-C

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        if repo_id in self.stops:
            raise KeyboardInterrupt
        if repo_id.startswith("others/"):
            raise PermissionError("403 Forbidden: you are not others\nRequest ID: 1")
        self.private.setdefault(repo_id, private)
        return f"https://hub/{repo_id}"

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private[repo_id])

    def upload_folder(
        self, *, repo_id, folder_path, allow_patterns, ignore_patterns, commit_message
    ):
        names = {str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*")}
        self.files[repo_id] = {
            name
            for name in names
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns)
        }


def offer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Let this process take the stub for the Hub, to which it has a key."""
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_key")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return hub


@contextmanager
def served(private: dict[str, bool], files: dict[str, dict[str, bytes]]) -> Iterator[str]:
    """Serve repositories by the Hub's interface, as far as a push goes; yields the address.

    Args:
        private, files: filled with what is pushed, by repository. An owner `others` is refused.
    """

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, body: bytes) -> tuple[int, Any]:
            path = self.path.partition("?")[0].removeprefix("/api/")
            if path == "repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if name.startswith("others/"):
                    return 403, {"error": "you are not others"}
                private.setdefault(name, asked["visibility"] == "private")
                return 200, {"url": f"{address}/{name}", "id": name, "name": name}
            if path == "validate-yaml":  # of the card
                return 200, {"errors": [], "warnings": []}
            kind, owner, repository, *rest = [*path.split("/"), "", ""][:6]
            name = f"{owner}/{repository}"
            if kind != "models" or name not in private:
                return 404, {"error": "not here"}
            if rest[:1] == ["preupload"]:
                paths = [file["path"] for file in json.loads(body)["files"]]
                kinds = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
                return 200, {"files": kinds}
            if rest[:1] == ["commit"]:
                lines = [json.loads(line)["value"] for line in body.splitlines()]
                files[name] = {
                    line["path"]: base64.b64decode(line["content"])
                    for line in lines
                    if "content" in line
                }
                return 200, {"commitUrl": f"{address}/{name}/commit/1", "commitOid": "1" * 40}
            return 200, {"id": name, "private": private[name], "sha": "1" * 40, "siblings": []}

        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if self.path.startswith(("/api/repos/", "/api/models/")):
                assert self.headers["Authorization"] == "Bearer hf_key"
            status, answer = self._answer(body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _reply

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
