"""Rollouts one update ahead of their training: the schedule, its resume, the overlap."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dschat.data.batches import PromptBatch
from dschat.errors import UserError
from dschat.rlhf.ahead import RolloutsAhead
from dschat.rlhf.answering import begin
from dschat.rlhf.part_config import SamplingConfig
from dschat.rlhf.policy_config import PolicyConfig
from dschat.rlhf.ppo_config import PPOConfig
from dschat.rlhf.rollout import scored
from dschat.rlhf.rollout_engine import TransformersRollout
from dschat.train.safe_load import load_file
from dschat.train.steps import with_next
from tests.helpers.adapters import ALONE
from tests.helpers.rounding import LOGITS, LOGPROBS
from tests.helpers.vllm_stub import Stub, served, vllm_rollout, without_adapters
from tests.rlhf.tiny_roles import Setting, ppo_trainer, prompts, weights

BATCHES = [[prompts(seed=seed)] for seed in range(4)]
LORA = replace(Setting().lora, lora_dim=4)


def trainer_of(load_roles, setting: Setting, ahead: bool = True):
    roles = load_roles(setting)
    trainer = ppo_trainer(roles, setting, rollout_importance_cap=2.0)
    trainer.ahead = RolloutsAhead(ALONE) if ahead else None
    return trainer


def run(trainer, batches: list[list[PromptBatch]]) -> list[dict[str, float]]:
    """Iterations as the recipe makes them."""
    figures = []
    for now, coming in with_next(batches, is_wanted=True):
        figures.append(trainer.train_rlhf(trainer.rollout(now, coming=coming)))
    return figures


def by_hand(trainer) -> None:
    """Answers t + 1 by the policy after t updates; scored, weighted and learnt from after t + 1."""
    roles, config = trainer.roles, trainer.config
    engine = TransformersRollout(roles.actor, roles.tokenizer)

    def sample(batches: list[PromptBatch]):
        begun = begin(roles, engine, batches, config, 1)
        return begun.batches, begun.wait()

    made = sample(BATCHES[0])
    for number in range(len(BATCHES)):
        following = sample(BATCHES[number + 1]) if number + 1 < len(BATCHES) else None
        experiences = scored(roles, *made, config, 1, keeps_pass=True)
        trainer.train_rlhf([trainer.rewards.applied(e, roles.tokenizer) for e in experiences])
        made = following


def test_the_schedule_is_that_of_a_reference_by_hand(load_roles):
    setting = Setting()
    trained = []
    for ahead in (True, False):
        trainer = trainer_of(load_roles, setting, ahead)
        torch.manual_seed(3)
        if ahead:
            figures = run(trainer, BATCHES)
        else:
            by_hand(trainer)
        trained.append(weights(trainer.roles.actor.module))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert [f["rollout_staleness"] for f in figures] == [0, 1, 1, 1]
    # What the first update has changed is what the weights correct from the second iteration on.
    assert figures[0]["decode_gap"] < LOGITS < 10 * LOGITS < figures[1]["decode_gap"]


def test_answers_under_way_outlive_a_stop(load_roles, tmp_path: Path):
    """A run that goes on from a checkpoint trains on the answers that the first one had begun."""
    first = trainer_of(load_roles, Setting())
    torch.manual_seed(3)
    first.train_rlhf(first.rollout(BATCHES[0], coming=BATCHES[1]))
    torch.save(first.ahead.state_dict(), tmp_path / "ahead.pt")
    state = load_file(str(tmp_path / "ahead.pt"))
    expected = first.rollout(BATCHES[1])[0]

    first.ahead.load_state_dict(state)
    torch.manual_seed(99)  # nothing is drawn
    found = first.rollout(BATCHES[1])[0]
    assert torch.equal(found.sequences, expected.sequences) and found.staleness == 1
    assert torch.equal(found.sampler_logprobs, expected.sampler_logprobs)
    assert torch.equal(found.logprobs, expected.logprobs)
    assert first.ahead.state_dict() == {}

    first.ahead.load_state_dict(state | {"ranks": 2})  # of a run with other ranks
    assert first.rollout(BATCHES[1])[0].staleness == 0


def test_an_engine_apart_samples_while_the_trainer_goes_on(load_roles, tmp_path: Path):
    setting = Setting(lora=LORA)
    trainer = trainer_of(load_roles, setting)
    stub = Stub(without_adapters(trainer.roles.actor.module), trainer.roles.tokenizer)
    may_answer = threading.Event()
    with served(stub) as url:
        trainer.engine = vllm_rollout(trainer.roles.actor, url, tmp_path)
        trainer.train_rlhf(trainer.rollout(BATCHES[0]))
        asked = []

        def held_back(answer):  # what was asked first comes at once, the rest when it may
            asked.append(answer)
            return answer if len(asked) <= 4 or may_answer.wait(600) else None

        stub.faults["/v1/completions"] = held_back
        old = weights(trainer.roles.actor.module)
        trainer.train_rlhf(trainer.rollout(BATCHES[1], coming=BATCHES[2]))  # does not wait
        may_answer.set()
        (late,) = trainer.rollout(BATCHES[2])
        assert late.staleness == 1
        # They are the former policy's: with its weights the gap is rounding.
        now = weights(trainer.roles.actor.module)
        assert not all(torch.equal(now[name], old[name]) for name in now)
        trainer.roles.actor.module.load_state_dict(old, strict=False)
        trainer.roles.eval()
        own = trainer.updates.policy_scores(late).logprobs
        gap = ((late.sampler_logprobs - own).abs() * late.answer_mask).max()
        assert gap < LOGPROBS < (late.sampler_logprobs - late.logprobs).abs().max()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout_importance_cap": 0.0}, "rollouts_ahead: .* give rollout_importance_cap"),
        ({"sampling": SamplingConfig(top_p=0.9)}, "rollout_importance_cap: with top_p"),
        ({"sampling": SamplingConfig(top_k=9)}, "rollout_importance_cap: with top_k"),
        ({"rollouts_ahead": 2}, "rollouts_ahead is 2: choose one of 0, 1"),
        (
            {
                "policy": PolicyConfig(dynamic_sampling_rounds=1),
                "advantage_estimator": "grpo",
                "answers_per_prompt": 2,
            },
            "rollouts_ahead: dynamic_sampling_rounds samples further prompts",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        PPOConfig(**{"rollouts_ahead": 1, "rollout_importance_cap": 2.0, **changes})


def test_pairs_of_following_items():
    assert [*with_next("abc", True)] == [("a", "b"), ("b", "c"), ("c", None)]
    assert [*with_next("abc", False)] == [("a", None), ("b", None), ("c", None)]
    assert [*with_next("", True)] == []
