"""Step 3 with answers by a server of vLLM, one update ahead, on two ranks, stopped and resumed."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers import tiny
from tests.helpers.resume_runs import PPO_COMMON, figures, interrupted, launch_runs, write_models
from tests.helpers.rounding import LOGPROBS
from tests.helpers.vllm_stub import Stub, served

pytestmark = pytest.mark.slow
AHEAD = ["--rollouts_ahead", "1", "--rollout_importance_cap", "2", "--dtype", "fp32"]
AHEAD += ["--actor_trainable_tokens", "none", "--max_steps", "4"]


def test_a_run_by_a_server_goes_on_as_if_it_had_never_stopped(tmp_path: Path):
    write_models(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=False)
    stub = Stub(model.eval(), tiny.byte_tokenizer(), longest=128)
    at = PPO_COMMON.index("--generation_chunk_size")
    argv = [*PPO_COMMON[:at], *PPO_COMMON[at + 2 :], *AHEAD, "--rollout_engine", "vllm"]
    with served(stub) as url:
        runs = interrupted([*argv, "--vllm_url", url], "ppo", save_steps=1, killed=3)
        outcomes = launch_runs(runs, tmp_path, ranks=2)
    codes = [outcomes[f"ppo {name}"].code for name in ("complete", "killed", "resumed")]
    assert codes == [0, -9, 0], outcomes["ppo complete"].stderr[-3000:]
    assert "rollouts: vllm, tiny-base at http://" in outcomes["ppo complete"].stdout
    complete, resumed = (figures(tmp_path / f"ppo-{name}") for name in ("complete", "killed"))
    assert complete == resumed
    steps = [line for line in complete if line["kind"] == "train"]
    assert [line["rollout_staleness"] for line in steps] == [0, 1, 1, 1]
    assert steps[0]["decode_gap_max"] < LOGPROBS
