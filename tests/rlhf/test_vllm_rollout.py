"""Rollouts by servers of vLLM, against a stub that really samples."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dschat.config import RLHFSettings
from dschat.errors import UserError
from dschat.rlhf.answering import repeated
from dschat.rlhf.engines import choose_engine
from dschat.rlhf.generation import SamplingConfig, answer_ends
from dschat.rlhf.vllm_rollout import VLLMRollout
from dschat.rlhf.vllm_server import VLLMServer
from dschat.rlhf.vllm_setup import check_servers
from dschat.utils.module.token_tables import add_token_rows, tables_of
from tests.helpers import tiny
from tests.helpers.adapters import ALONE
from tests.helpers.rounding import LOGPROBS
from tests.helpers.vllm_stub import RefusedError, Stub, served, vllm_rollout, without_adapters
from tests.rlhf.tiny_roles import LORA, Setting, ppo_trainer, prompts

GIVEN = {"actor_model_name_or_path": "a", "critic_model_name_or_path": "c", "actor_lora_dim": 4}
GIVEN |= {"rollout_engine": "vllm", "vllm_url": ("http://node7:8000",), "temperature": 0.7}
LLAMA = tiny.tiny_llama()


@contextmanager
def engine_of(
    folder: Path, model: torch.nn.Module | None = None, **changes: object
) -> Iterator[tuple[VLLMRollout, Stub]]:
    """An engine on a stub of its own, for a model with adapters."""
    model = model or tiny.adapted(tiny.tiny_llama())
    stub = Stub(without_adapters(model), tiny.byte_tokenizer())
    with served(stub) as url:
        yield vllm_rollout(model, url, folder, **changes), stub


def paths(stub: Stub, word: str) -> list[dict]:
    return [body for path, body in stub.calls if word in path]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vllm_url": ()}, "rollout_engine vllm: no server is named; give vllm_url"),
        ({"vllm_url": ("node7:8000",)}, "vllm_url node7:8000: give an address such as http"),
        ({"rollout_engine": "static"}, "vllm_url does nothing with rollout_engine static"),
        ({"actor_lora_dim": 0}, "vllm, actor_lora_dim 0: servers are sent adapters, not a whole"),
        ({"train_base_model": True}, "train_base_model: servers are sent adapters"),
        ({"actor_use_dora": True}, "actor_use_dora: vLLM reads no DoRA"),
        ({"actor_modules_to_save": ("norm",)}, "actor_modules_to_save: vLLM reads LoRA's"),
        ({"actor_trainable_tokens": ("</s>",)}, "actor_trainable_tokens: vLLM reads no rows"),
        ({"top_p": 0.9}, "top_p and top_k: a server tells log-probabilities of what they leave"),
        ({"top_k": 5}, "top_p and top_k: a server tells"),
        ({"fuse_lora_for_generation": True}, "fuse_lora_for_generation: it is for rollouts inside"),
        ({"generation_chunk_size": 8}, "generation_chunk_size: a server decides by itself"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        RLHFSettings.of(**GIVEN | changes)
    assert RLHFSettings.of(**GIVEN).rollouts.vllm.vllm_timeout == 600


def test_each_set_of_weights_is_sent_once_under_a_name_of_its_own(tmp_path):
    left = tmp_path / "leftover"
    with engine_of(tmp_path) as (engine, stub):
        (tmp_path / f"{engine.adapters._prefix}-old-3").mkdir()  # of a run that was killed
        left.mkdir()  # somebody else's
        for _ in range(2):
            engine.generate(prompts(), SamplingConfig(3))
        engine.weights_changed()
        engine.generate(prompts(), SamplingConfig(3))
        names = [body["lora_name"] for body in paths(stub, "/load_lora")]
        assert len(names) == 2 and names[0] != names[1]
        assert [body["lora_name"] for body in paths(stub, "/unload_lora")] == names[:1]
        assert {path.name for path in tmp_path.iterdir()} == {names[1], "leftover"}
        asked = [body["model"] for body in paths(stub, "completions")]
        assert asked == 8 * names[:1] + 4 * names[1:]


def test_a_prompts_answers_are_one_request_and_differ(tmp_path):
    with engine_of(tmp_path) as (engine, stub):
        batch = repeated(prompts(), 3)
        made = engine.generate(batch, SamplingConfig(6))
        bodies = paths(stub, "completions")
        assert [body["n"] for body in bodies] == [3] * 4
        assert len({body["seed"] for body in bodies}) == 4
        assert torch.equal(made.sequences[:, : batch.input_ids.shape[1]], batch.input_ids)
        assert len(made.sequences.unique(dim=0)) == 12
        # What the model's folder says of sampling and ends must not count.
        assert all(body["top_p"] == 1 and body["ignore_eos"] for body in bodies)


def test_answers_end_with_a_stop_string(tmp_path):
    model, tokenizer = tiny.adapted(tiny.tiny_llama()), tiny.byte_tokenizer()
    with engine_of(tmp_path, model) as (engine, _):
        whole = engine.generate(prompts(), SamplingConfig(8, greedy=True)).sequences[:, -8:]
        stop = tokenizer.decode(whole[0, 2:4])
        made = engine.generate(prompts(), SamplingConfig(8, greedy=True, stop_strings=(stop,)))
        answers = made.sequences[:, prompts().input_ids.shape[1] :]
        mask, ended = answer_ends(answers, tokenizer, (stop,))
        assert ended[0] and mask[0].sum() <= 4
        assert torch.equal(answers[0][mask[0]], whole[0, : mask[0].sum()])


def test_servers_sleep_between_rollouts_and_are_awake_for_adapters(tmp_path):
    with engine_of(tmp_path, sleeps=True) as (engine, stub):
        for _ in range(2):
            engine.generate(prompts(), SamplingConfig(3))  # the stub refuses work in its sleep
            assert stub.asleep
            engine.weights_changed()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def raising(status: int, message: str):
    def fault(_: object) -> None:
        raise RefusedError(status, message)

    return fault


@pytest.mark.parametrize(
    "path, fault, message",
    [
        (
            "/v1/load_lora_adapter",
            raising(400, "LoRA rank 64 is greater than max_lora_rank 16."),
            r"/v1/load_lora_adapter was refused \(400\): LoRA rank 64 is greater",
        ),
        (
            "/v1/completions",
            lambda a: {"choices": a["choices"][:0]},
            r"returns 0 answers \(ids and log-probabilities: none\), where 1 of up to 3 ids",
        ),
        (
            "/v1/completions",
            lambda a: {"choices": [c | {"token_ids": c["token_ids"] * 9} for c in a["choices"]]},
            r"returns 1 answers \(ids and log-probabilities: \d+ and \d\)",
        ),
        (
            "/v1/completions",
            lambda a: {"choices": [{"index": 0, "text": "yes"}]},
            "returns no token ids with log-probabilities; take a version of vLLM",
        ),
        (
            "/v1/completions",
            lambda _: "[" * 100_000,
            "returns no token ids with log-probabilities; take a version of vLLM",
        ),
        (
            "/v1/load_lora_adapter",
            raising(400, "[" * 100_000),
            r"/v1/load_lora_adapter was refused \(400\): \[{200,400}$",
        ),
        ("/v1/completions", lambda _: time.sleep(2), "no answer to /v1/completions within 0.5 s"),
        ("/v1/models", lambda _: {"status": "fine"}, "/v1/models names no model; give a server"),
    ],
    ids=["4xx", "no answers", "too many ids", "no ids", "nested", "4xx nested", "timeout", "other"],
)
def test_what_a_server_does_wrong_is_one_line(tmp_path, path, fault, message):
    with engine_of(tmp_path) as (engine, stub):
        stub.faults[path] = fault
        with pytest.raises(UserError, match=f"^vllm_url http://[0-9.:]+: .*{message}") as said:
            engine.__post_init__()  # asks for the model
            if "within" in message:
                engine.server = VLLMServer(engine.server.url, 0.5)
            engine.generate(prompts(), SamplingConfig(3))
    assert "\n" not in str(said.value)


def test_a_server_that_takes_no_adapters_or_is_gone_is_named(tmp_path):
    with engine_of(tmp_path) as (engine, stub):
        answer = stub.answer
        stub.answer = lambda path, body: answer("/none" if "load_lora" in path else path, body)
        with pytest.raises(UserError, match="has no /v1/load_lora_adapter; start it with --enable"):
            engine.generate(prompts(), SamplingConfig(3))
    with pytest.raises(
        UserError, match=r"cannot be reached for /v1/load_lora_adapter \(Connection"
    ):
        engine.generate(prompts(), SamplingConfig(3))
    with pytest.raises(UserError, match="cannot be reached for /v1/models"):
        vllm_rollout(LLAMA, closed_port(), tmp_path)


def actors_settings(folder: Path, url: str, **changes: object) -> RLHFSettings:
    given = GIVEN | {"vllm_url": (url,), "output_dir": str(folder / "out"), "max_steps": 1}
    return RLHFSettings.of(**given | {"max_prompt_seq_len": 20, "max_answer_seq_len": 8} | changes)


def test_servers_are_asked_before_weights_are_loaded(tmp_path):
    tokenizer = tiny.byte_tokenizer()
    stub = Stub(LLAMA, tokenizer, longest=30)
    with served(stub) as url:
        check_servers(actors_settings(tmp_path, url), tokenizer)
        with pytest.raises(UserError, match=f"vllm_url {url}: it takes texts of 30 tokens, a prom"):
            check_servers(actors_settings(tmp_path, url, max_answer_seq_len=11), tokenizer)
        stub.faults["/tokenize"] = lambda answer: answer | {"tokens": answer["tokens"][:-1]}
        with pytest.raises(UserError, match="the tokenizer of tiny-base makes other ids of a text"):
            check_servers(actors_settings(tmp_path, url), tokenizer)
    with pytest.raises(UserError, match="cannot be reached for /v1/models"):
        check_servers(actors_settings(tmp_path, url), tokenizer)


def test_a_run_proves_its_server_and_follows_the_weights(load_roles, folders, tmp_path, capsys):
    roles = load_roles(Setting(lora=LORA))
    stub = Stub(without_adapters(roles.actor.module), roles.tokenizer)
    changes = {"actor_model_name_or_path": str(folders["llama"].actor), "actor_lora_alpha": 8.0}
    with served(stub) as url:
        settings = actors_settings(tmp_path, url, **changes)
        capsys.readouterr()
        engine = choose_engine(settings, roles, roles.tokenizer, ALONE)
        assert f"rollouts: vllm, tiny-base at {url}; log-prob" in capsys.readouterr().out
        trainer = ppo_trainer(roles, Setting(), rollout_importance_cap=2.0)
        trainer.engine = engine
        for _ in range(3):
            statistics = trainer.train_rlhf(trainer.rollout([prompts()]))
            assert statistics["decode_gap_max"] < LOGPROBS
        sent = paths(stub, "/load_lora")
        assert len(sent) == 3
        config = json.loads((Path(sent[-1]["lora_path"]) / "adapter_config.json").read_text())
        assert config["r"] == 4 and Path(sent[-1]["lora_path"]).parent.name == "vllm_adapters"


@pytest.mark.parametrize("what", ["weights", "log-probabilities", "rows of tokens"])
def test_another_policy_is_refused(load_roles, folders, tmp_path, what):
    roles = load_roles(Setting(lora=LORA))
    other = tiny.tiny_llama(seed=9) if what == "weights" else without_adapters(roles.actor.module)
    stub = Stub(other, roles.tokenizer)
    if what == "log-probabilities":  # before the temperature, as is vLLM's default
        stub.sample = lambda *_: ([7, 8, 9], [-5.0, -5.0, -5.0])
    message = "samples another policy: log-probabilities of .* nats off"
    if what == "rows of tokens":
        add_token_rows(roles.actor.module, [2], tables_of(roles.actor.module, []))
        message = "embed_tokens trains or is new, and vLLM reads matrices of LoRA"
    changes = {"actor_model_name_or_path": str(folders["llama"].actor)}
    with served(stub) as url, pytest.raises(UserError, match=message):
        settings = actors_settings(tmp_path, url, **changes)
        choose_engine(settings, roles, roles.tokenizer, ALONE)
