"""The commands of the pages that train, load or plan models, run as they stand on tiny ones."""

from pathlib import Path

import pytest

from tests.docs import page_folders
from tests.docs.page_commands import FAST, UNTRIED, commands
from tests.helpers import hub, tiny, vllm_stub

TRIED = [command for command in commands() if command.program not in UNTRIED]
SLOW = sorted(
    (command for command in TRIED if command.program not in FAST),
    key=lambda command: command.page != page_folders.FIRST,
)


class Server(vllm_stub.Stub):
    """A server that also chats."""

    def answer(self, path: str, body: object) -> object:
        if path == "/v1/chat/completions":
            return {"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}
        return super().answer(path, body)


@pytest.mark.slow
def test_every_command_that_trains_or_loads_a_model_runs(tmp_path: Path):
    stub = Server(
        tiny.tiny_llama(max_position_embeddings=2048), tiny.byte_tokenizer(), longest=2048
    )
    private: dict[str, bool] = {}
    files: dict[str, dict[str, bytes]] = {}
    with vllm_stub.served(stub) as server, hub.served(private, files) as address:
        wrong = page_folders.run_all(
            SLOW,
            tmp_path,
            SERVER=server.removeprefix("http://"),
            HF_ENDPOINT=address,
            HF_TOKEN="hf_key",
            HF_HUB_OFFLINE="0",
        )
    assert not wrong, wrong
    assert private == {"me/my-model": True, "me/my-sft": True}
    assert any(path == "/v1/completions" for path, _ in stub.calls)
