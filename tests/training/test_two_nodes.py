"""The three steps on two nodes: of torchrun, of srun with kills and requeues, of mpirun.

Nodes are namespaces with a network, a host name, a cache and a disk of their own, or processes with
folders of their own (`tests/helpers/nodes.py`); one disk they share. Each has one process.
"""

import json
import shlex
from pathlib import Path

import pytest

from tests.helpers.nodes import OWN_DISK, Node, by_mpirun, by_srun, by_torchrun, two_nodes
from tests.helpers.resume_runs import (
    WORKER,
    Outcome,
    Run,
    assert_same_end,
    assert_same_run,
    read_outcomes,
    while_saving,
    write_models,
    write_plan,
)
from tests.helpers.steps import PPO, REWARD, SFT
from tests.helpers.steps import WORKER as STEPS

# The cache is each node's own. 27 rows, 4 of both nodes in a step: 7 steps; 2 iterations of PPO.
DATA = "--data_path data --data_split 4,4,2 --num_warmup_steps 2 --dtype fp32 --log_every 2"
ONE = f"{DATA} --max_seq_len 64 --per_device_train_batch_size 2 --learning_rate 1e-3 --dropout 0.1"
ROLES = (
    f"{DATA} --max_prompt_seq_len 48 --max_answer_seq_len 4 --max_train_samples 8 --ppo_epochs 2"
)
ROLES += " --per_device_generation_batch_size 2 --per_device_training_batch_size 2"
ROLES += " --actor_lora_dim 4 --actor_learning_rate 1e-3 --critic_learning_rate 1e-3"
ROLES += " --max_eval_samples 4 --actor_zero_stage 3 --critic_zero_stage 3"
NEAR = '{"zero_optimization": {"zero_hpz_partition_size": 2}}'


def steps(to: str, ppo: str = "") -> dict[str, list[str]]:
    """Command lines of the three steps into a folder, each from the models of those before."""
    models = f"--actor_model_name_or_path {to}/sft --critic_model_name_or_path {to}/reward"
    flags = {
        "sft": (SFT, f"--model_name_or_path model --lora_dim 4 {ONE}"),
        "reward": (REWARD, f"--model_name_or_path model --zero_stage 2 {ONE}"),
        "ppo": (PPO, f"{models} {ROLES} {ppo}"),
    }
    return {
        name: [main, *shlex.split(f"{words} --output_dir {to}/{name}")]
        for name, (main, words) in flags.items()
    }


def requeued(name: str, argv: list[str], interval: int, **end: object) -> dict[str, Run]:
    """One command line twice; the first start is ended, in a save or by a signal."""
    again = [*argv, "--save_steps", str(interval), "--resume"]
    return {f"{name} ended": Run(again, **end), f"{name} requeued": Run(again)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Node], dict[str, list]]:
    """What came of the runs, by name, on each node."""
    folder = tmp_path_factory.mktemp("nodes")
    write_models(folder)
    outcomes: dict[str, list[Outcome]] = {}
    with two_nodes(folder) as nodes:
        for start, to, names in ((by_torchrun, "torchrun", 3), (by_mpirun, "mpirun", 1)):
            (folder / to).mkdir()
            plan = folder / to / "plan.json"
            plan.write_text(json.dumps(list(steps(to).values())[:names]))
            codes = start(nodes, [str(STEPS), str(plan)], folder, to).wait()
            assert codes == [0, 0], (folder / f"{to}.0.log").read_text()[-4000:]
        (folder / "near.json").write_text(NEAR)  # a second copy of the weights, in other shards
        there = steps("srun", ppo="--deepspeed_config near.json")
        local = [*there["sft"], "--save_steps", "2", "--output_dir", f"${OWN_DISK}/out"]
        plan = {
            **requeued("sft", there["sft"], 3, kill=while_saving(6)),
            **requeued("reward", there["reward"], 100, signal=("SIGUSR1", 1, 3)),
            **requeued("ppo", there["ppo"], 1, kill=while_saving(2)),
            "unshared": Run(local),
        }
        codes = by_srun(nodes, [str(WORKER), write_plan(plan, folder, 2)], folder, "srun").wait()
        assert codes == [0, 0], (folder / "srun.0.log").read_text()[-4000:]
        found = [read_outcomes(plan, folder, rank) for rank in range(2)]
    outcomes = {name: [each[name] for each in found] for name in plan}
    return folder, nodes, outcomes


@pytest.mark.slow
def test_torchrun_srun_and_mpirun_train_the_same(runs):
    """Those of srun were ended once, each by one of the ways that a job ends, and requeued."""
    folder, _, outcomes = runs
    codes = {name: [outcome.code for outcome in both] for name, both in outcomes.items()}
    errors = [outcome.stderr[-2000:] for both in outcomes.values() for outcome in both]
    assert codes == {
        **{"sft ended": [-9, -9], "sft requeued": [0, 0]},
        **{"reward ended": [75, 75], "reward requeued": [0, 0]},
        **{"ppo ended": [-9, -9], "ppo requeued": [0, 0]},
        "unshared": [2, 2],
    }, errors
    assert_same_run(folder / "torchrun/sft", folder / "mpirun/sft")
    for name in ("sft", "reward", "ppo"):
        assert_same_end(folder / "torchrun" / name, folder / "srun" / name)


@pytest.mark.slow
def test_rows_are_tokenised_once_on_each_node(runs):
    folder, nodes, _ = runs
    sets = [sorted(path.name for path in (n.disk / "cache/dschat").glob("*/*")) for n in nodes]
    assert sets[0] == sets[1] and sets[0]
    assert not (folder / "cache").exists()


@pytest.mark.slow
def test_an_output_folder_that_nodes_do_not_share_is_said_at_the_start(runs):
    _, nodes, outcomes = runs
    line = outcomes["unshared"][0].error
    # Of processes, each node has a path of its own; of namespaces, one that means its own disk.
    assert line.startswith(tuple(f"error: output_dir {node.local}/out: " for node in nodes))
    assert line.endswith(
        "does not see what rank 0 writes there, as checkpoints need; give a folder on a disk that "
        "all machines share, or drop save_steps and resume"
    )
