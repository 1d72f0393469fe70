"""When the start of a run says that it is short, and the values that it names."""

from dataclasses import replace

import pytest

from dschat.config import RewardSettings, SFTSettings
from dschat.config.fitting import fitted_length
from dschat.train.run_length import RunLength
from dschat.train.steps import StepPlan


def advice(*argv: str, batches: list[int | None]) -> list[str]:
    flags = dict(zip(argv[::2], argv[1::2], strict=True))
    numbers = {name: int(text) if text.isdigit() else text for name, text in flags.items()}
    settings = SFTSettings.of(model_name_or_path="m", **numbers)
    return settings.length(batches).advice()


def test_a_run_of_enough_steps_is_quiet():
    assert advice(batches=[20]) == []
    assert advice("num_warmup_steps", "6", batches=[20]) == []
    assert advice("gradient_accumulation_steps", "8", batches=[160]) == []
    assert advice("max_steps", "20", batches=[None]) == []


def test_accumulation_that_holds_the_entire_data():
    """54 rows of one's own by 16 and 8, as the shipped script has it: four micro-batches."""
    lines = advice("gradient_accumulation_steps", "8", batches=[4])
    assert lines == [
        "advice: gradient_accumulation_steps 8: an epoch has 4 micro-batches; give 1",
        "advice: optimizer steps in all: 1, too few to learn much from; give "
        "gradient_accumulation_steps 1 and num_train_epochs 5",
    ]
    assert (
        SFTSettings.of(model_name_or_path="m", gradient_accumulation_steps=1, num_train_epochs=5)
        .length([4] * 5)
        .steps
        == 20
    )


def test_the_least_change_that_makes_enough_steps():
    lines = advice("gradient_accumulation_steps", "8", batches=[50])  # 7 steps; by 2 there are 25
    assert lines == [
        "advice: optimizer steps in all: 7, too few to learn much from; give "
        "gradient_accumulation_steps 2"
    ]
    assert advice(batches=[19])[0].endswith("give num_train_epochs 2")
    assert advice("max_steps", "7", batches=[100])[0].endswith("give max_steps 20")
    assert advice("max_steps", "7", batches=[None])[0].endswith("give max_steps 20")


@pytest.mark.parametrize("warm_up, said", [(10, False), (11, True), (1000, True)])
def test_a_warm_up_beyond_a_third(warm_up: int, said: bool):
    lines = advice("num_warmup_steps", str(warm_up), batches=[30])
    assert len(lines) == said
    if said:
        assert lines[0] == (
            f"advice: num_warmup_steps {warm_up}: more than a third of the run's 30 optimizer "
            "steps, so it is hardly at its learning rate; give 3"
        )
    flat = ["num_warmup_steps", str(warm_up), "lr_scheduler_type", "constant"]
    assert advice(*flat, batches=[30]) == []  # a constant rate never warms up


def test_both_at_once_name_values_that_go_together():
    length = RunLength(epochs=1, micro_batches=80, accumulation=8, warm_up=9)  # 10 steps
    fitting = length.with_more_steps().with_shorter_warm_up()
    assert (fitting.accumulation, fitting.steps, fitting.warm_up) == (4, 20, 2)
    assert length.advice()[-1].endswith("give 2")
    assert fitting.advice() == []
    third = RunLength(epochs=1, micro_batches=80, accumulation=8, warm_up=5)  # of 20 steps no third
    assert third.advice()[-1].endswith("give 1")


def test_epochs_make_up_for_few_rows():
    length = RunLength(epochs=1, micro_batches=8, accumulation=1, warm_up=0, waiting=1)
    assert (length.with_more_epochs().epochs, length.with_more_epochs().steps) == (3, 23)
    assert replace(length, epochs=3).with_more_epochs().epochs == 3
    assert replace(length, max_steps=5).with_more_epochs().epochs == 1  # they would change nothing


def test_steps_that_are_wanted_are_worth_so_many_epochs():
    length = RunLength(epochs=1, micro_batches=17, accumulation=4, warm_up=0)
    assert (length.with_more_steps(60).accumulation, length.with_more_steps(9).accumulation) == (
        1,
        2,
    )
    by_micro_batches = {17: 4, 12: 4, 7: 4, 30: 2, 45: 2, 60: 1, 200: 1}
    found = {
        n: fitted_length(replace(length, micro_batches=n), (), 60).epochs for n in by_micro_batches
    }
    assert found == by_micro_batches
    few = replace(length, micro_batches=3)  # 20 steps in any case
    assert fitted_length(few, (), 60).epochs == fitted_length(few, ()).epochs == 7
    assert fitted_length(replace(length, epochs=5), (), 60).epochs == 5
    assert fitted_length(length, ["num_train_epochs"], 60).epochs == 1
    assert fitted_length(length, []).epochs == 2


def test_the_reward_model_too():
    settings = RewardSettings.of(model_name_or_path="m", num_warmup_steps=5)
    assert len(settings.length([2, 2, 2]).advice()) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"save_steps": 12, "num_train_epochs": 2}, []),
        (
            {"save_steps": 13, "num_train_epochs": 2},
            [
                "save_steps 13: the run ends at step 12, so there will be no checkpoint; give "
                "fewer, such as 6"
            ],
        ),
        ({"num_train_epochs": 2, "max_steps": 7}, []),
        (
            {"num_train_epochs": 3, "max_steps": 6},
            ["num_train_epochs 3: the run ends in epoch 1, at step 6"],
        ),
        (
            {"num_train_epochs": 3, "max_steps": 7},
            ["num_train_epochs 3: the run ends in epoch 2, at step 7"],
        ),
        (
            {"eval_interval": 13, "num_train_epochs": 2},
            [
                "eval_interval 13: the run ends at step 12, so it is evaluated before it and "
                "after each epoch alone"
            ],
        ),
    ],
)
def test_what_lies_beyond_the_end_of_a_run_is_said(flags: dict[str, int], said: list[str]):
    """Epochs of six steps."""
    settings = SFTSettings.of(model_name_or_path="m", **flags)
    steps = StepPlan.of([6] * settings.run.num_train_epochs, 1, settings.max_steps)
    assert settings.run.remarks(steps, settings.eval_interval) == said
    streamed = StepPlan.of([None], 1, 12)
    assert settings.run.remarks(streamed, 0) == [line for line in said if "save_steps" in line]


def test_an_interval_evaluates_where_no_end_does():
    """Two epochs of six steps, the second cut short: each model is evaluated once."""
    steps = StepPlan.of([6, 6], 1, 11)
    between = [step for step in range(1, 12) if steps.is_evaluated_between(step, 2)]
    assert between == [2, 4, 8, 10]  # 6 ends an epoch; 11 ends the run
    assert [s for s in range(1, 12) if steps.is_evaluated_between(s, 11)] == []
    assert not any(steps.is_evaluated_between(step, 0) for step in range(1, 12))
    streamed = StepPlan.of([None], 1, 12)
    assert [s for s in range(1, 13) if streamed.is_evaluated_between(s, 4)] == [4, 8]
