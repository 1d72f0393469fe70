"""Programs of others on a model folder, where they are installed: docs/tools.md names them.

pip install lm-eval 'transformers[serving]'
"""

import json
import os
import re
import socket
import string
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dschat.chat.bot import load_chatbot
from dschat.chat.remote import RemoteChatbot
from dschat.config.programs import ChatSettings
from dschat.text.formats import set_format
from tests.helpers.launch import TIME_LIMIT
from tests.helpers.rounding import LOGPROBS
from tests.helpers.steps import write_rows
from tests.helpers.tiny import byte_tokenizer, tiny_llama

pytestmark = pytest.mark.slow
QUESTIONS = ["Why?", "And how is that?"]
TASK = """\
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: answers
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of letters that learned turns, with the template that says so to others."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    set_format(tokenizer, "dschat", teaches=True)
    model = tiny_llama(max_position_embeddings=256)
    letters = tokenizer(string.ascii_letters, add_special_tokens=False).input_ids
    others = [i for i in range(model.config.vocab_size) if i not in letters]
    with torch.no_grad():
        model.lm_head.weight[others] = 0  # one of 52 letters nearly always has a logit above 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_lm_evaluation_harness_reads_what_training_did(folder: Path, tmp_path: Path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    answers = [" yes it is", " No"]  # a harness that applies a template adds no space
    rows = [{"question": question, "answers": answers} for question in QUESTIONS]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "own.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    result = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=["own"],
        device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
    )
    tokenizer, model = byte_tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    for sample, question in zip(result["samples"]["own"], QUESTIONS, strict=True):
        found = [response[0] for response in sample["filtered_resps"]]
        expected = []
        for answer in answers:
            prompt = tokenizer(f"\n\nHuman: {question}\n\nAssistant:").input_ids
            ids = tokenizer(answer).input_ids
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])
            expected.append(logprobs.sum().item())
        assert found == pytest.approx(expected, abs=len(answers[0]) * LOGPROBS)


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` with the model."""
    for needed in ("fastapi", "uvicorn"):
        pytest.importorskip(needed)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    words = [*TRANSFORMERS, "serve", str(folder), "--port", str(port), "--device", "cpu"]
    with log.open("w") as file:
        server = subprocess.Popen([*words, "--dtype", "float32"], stdout=file, stderr=file)
    try:
        end = time.monotonic() + TIME_LIMIT
        while not _answers(f"http://localhost:{port}/health"):
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait(TIME_LIMIT)


TRANSFORMERS = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=TIME_LIMIT) as reply:
            return reply.status == 200
    except OSError:
        return False


def own_answers(folder: Path) -> list[str]:
    """What the folder's model says to the questions, in turn, by the likeliest tokens."""
    bot = load_chatbot(ChatSettings(str(folder), temperature=0, max_new_tokens=8))
    return [bot.ask(question, lambda piece: None).strip() for question in QUESTIONS]


def test_transformers_serve_says_what_the_folder_says(folder: Path, address: str):
    settings = ChatSettings(f"{address}/v1", model=str(folder), temperature=0, max_new_tokens=8)
    bot = RemoteChatbot(settings)
    said = [bot.ask(question, lambda piece: None).strip() for question in QUESTIONS]
    assert said == own_answers(folder) and len(said[0]) == 8


def test_transformers_chat_takes_the_folder(folder: Path, address: str, tmp_path: Path):
    words = [*TRANSFORMERS, "chat", str(folder), address, "do_sample=False", "max_new_tokens=8"]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        input=f"{QUESTIONS[0]}\n!exit\n",
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout)
    assert own_answers(folder)[0] in plain, json.dumps(done.stdout + done.stderr)
