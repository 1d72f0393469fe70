"""What the plan says to change where a step does not fit."""

from pathlib import Path

import pytest

from dschat.config import RLHFSettings, SFTSettings
from dschat.config.cli import parse
from dschat.plan.memory import AnySettings
from dschat.plan.recipe import step_of
from dschat.plan.remedies import changed, largest_micro_batch, remedies
from dschat.plan.roles import GIB, MemoryPlan, Phase
from dschat.settings import flag_values
from tests.config.test_recipes import FOLDER
from tests.helpers.tiers import tiers

CORE = ["opt/single_node/sft_6.7b.yaml", "llama3/single_gpu/ppo_8b.yaml"]
RECIPES = [
    *CORE,
    *("bloom/single_node/sft_1.1b_chinese.yaml", "opt/single_gpu/sft_1.3b.yaml"),
    *("gemma3/single_gpu/dpo_4b.yaml", "llama2/single_node/reward_7b.yaml"),
    *("llama2/single_node/ppo_7b.yaml", "llama2/single_node/ppo_7b_lora.yaml"),
    *("llama3/single_gpu/ppo_8b_one_trunk.yaml", "opt/single_gpu/ppo_1.3b.yaml"),
    *("opt/single_node/ppo_1.3b_sweep.yaml", "opt/multi_node/ppo_66b.yaml"),
]


def by_rows(settings: SFTSettings) -> MemoryPlan:
    """Rows need 2 GiB each beside 10 GiB."""
    rows = settings.batch.per_device_train_batch_size
    return MemoryPlan({}, (Phase("training", {"activations": (10 + 2 * rows) * GIB}),))


def test_the_largest_micro_batch_is_where_the_line_crosses():
    settings = SFTSettings.of(model_name_or_path="m", per_device_train_batch_size=4)
    # 1.05 * (10 + 2 rows) + 0.75 <= 40: rows <= 13.69
    assert largest_micro_batch(settings, by_rows, 40 * GIB) == 13


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(8, [(4, 2), (2, 4), (1, 8)]), (6, [(3, 2), (1, 6)]), (15, [(5, 3), (1, 15)])],
)
def test_remedies_keep_the_optimizer_step(rows: int, expected: list[tuple[int, int]]):
    settings = SFTSettings.of(model_name_or_path="m", per_device_train_batch_size=rows)
    found = remedies(settings, by_rows, 14 * GIB, ranks=1)  # one row: 1.05 * 12 + 0.75
    assert [r.change for r in found] == [
        f"--per_device_train_batch_size {few} --gradient_accumulation_steps {times}"
        for few, times in expected
    ]
    assert changed(settings, lora_dim=4).model.lora.lora_dim == 4


class Saving:
    """A plan by which every change saves a GiB; it notes what it planned."""

    def __init__(self) -> None:
        self.settings: list[AnySettings] = []

    def __call__(self, settings: AnySettings) -> MemoryPlan:
        if isinstance(settings, RLHFSettings):
            settings.role_setup("bf16", iterations=1)  # roles are checked against each other
        self.settings.append(settings)
        needed = {"activations": (1000 - len(self.settings)) * GIB}
        return MemoryPlan({}, (Phase("training", needed),))


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("name", tiers(RECIPES, CORE))
def test_every_change_is_one_that_its_step_takes(name: str, ranks: int):
    """By its flags, in their order: the recipe with all of them is what was planned last."""
    path, planned = Path(FOLDER) / name, Saving()
    step, words = step_of(path, None), ["--config", str(path)]
    found = remedies(parse(step, words, None), planned, 0, ranks)
    assert len(found) == len(planned.settings) - 1 > 0
    words += [word for remedy in found for word in remedy.change.split()]
    assert flag_values(parse(step, words, None)) == flag_values(planned.settings[-1])


def test_copies_of_weights_for_rollouts_are_the_first_to_go():
    settings = RLHFSettings.of(
        actor_model_name_or_path="a",
        advantage_estimator="grpo",
        answers_per_prompt=2,
        reward_function=("m:f",),
        actor_zero_stage=3,
        gather_for_rollouts=True,
    )

    def held(settings: RLHFSettings) -> MemoryPlan:
        weights = 2 + 14 * settings.rollouts.gather_for_rollouts
        return MemoryPlan({}, (Phase("generation", {"weights": weights * GIB}),))

    (remedy,) = remedies(settings, held, 8 * GIB, ranks=8)
    assert remedy.change == "no --gather_for_rollouts"
    assert remedy.saved == pytest.approx(1.05 * 14 * GIB)
