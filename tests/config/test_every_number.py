"""Numbers of every program are checked: not finite and, but for a few, negative is refused."""

import pytest

from dschat.config import RewardSettings, RLHFSettings, SFTSettings
from dschat.data.__main__ import InspectSettings
from dschat.errors import UserError
from dschat.settings import Flag, Settings, flags_of
from inference.chatbot import ChatSettings
from tests.config.test_dschat_flags import script

PROGRAMS: dict[str, type[Settings]] = {
    "step1": SFTSettings,
    "step2": RewardSettings,
    "step3": RLHFSettings,
    "inspect": InspectSettings,
    "chat": ChatSettings,
    "rw_eval": script("training/step2_reward_model_finetuning/rw_eval.py")["RewardEvaluation"],
    "prompt_eval": script("training/step1_supervised_finetuning/prompt_eval.py")[
        "PromptEvaluation"
    ],
}
# A launcher's rank is no choice of the user's; rewards may be turned round, and preferences may
# have a margin on either side.
MAY_BE_NEGATIVE = {"local_rank", "reward_function_weight", "reward_model_weight", "margin"}
# Given so that a flag that needs another one is reached by its own check.
NEEDED = {
    "model_name_or_path": "m",
    "actor_model_name_or_path": "m",
    "critic_model_name_or_path": "m",
    "model_name_or_path_baseline": "m",
    "model_name_or_path_finetune": "m",
    "path": "m",
}


def numbers(kinds: tuple[type, ...]) -> list:
    return [
        pytest.param(cls, flag, id=f"{program}-{flag.name}")
        for program, cls in PROGRAMS.items()
        for flag in flags_of(cls)
        if flag.kind.element in kinds and not flag.rule.retired
    ]


def refuse(cls: type[Settings], flag: Flag, value: float) -> None:
    names = {f.name for f in flags_of(cls)}
    needed = {name: text for name, text in NEEDED.items() if name in names}
    given = (value,) if flag.kind.is_tuple else value
    with pytest.raises(UserError) as error:
        cls.of(**needed | {flag.name: given})
    message = str(error.value)
    wanted = "choose one of" if flag.rule.choices else "give"
    assert message.startswith(f"{flag.name} is {value}: {wanted} ") and "\n" not in message


@pytest.mark.parametrize(("cls", "flag"), numbers((float,)))
def test_a_number_that_is_not_finite_is_refused(cls, flag):
    for value in (float("nan"), float("inf"), float("-inf")):
        refuse(cls, flag, value)


@pytest.mark.parametrize(("cls", "flag"), numbers((int, float)))
def test_a_negative_number_is_refused(cls, flag):
    if flag.name not in MAY_BE_NEGATIVE:
        refuse(cls, flag, flag.kind.element(-1))


@pytest.mark.parametrize(("cls", "flag"), numbers((int,)))
def test_half_a_thing_is_refused(cls, flag):
    refuse(cls, flag, 1.5)
