"""Built-in checks: which number a text states, and which form it has."""

from decimal import Decimal

import pytest

from dschat.errors import UserError
from dschat.rlhf.checks import exact_number, final_number, length_within, whole_pattern
from dschat.rlhf.part_config import RewardConfig
from dschat.rlhf.reward_functions import load_functions
from dschat.settings import flags_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", "7"),
        ("#### 5 so, no: #### 1,234.50 dollars, of 9", "1234.5"),  # the last mark, the first number
        ("3 and then $1,234", "1234"),
        (" -12.0", "-12"),
        ("10-3", "3"),  # a minus after a digit subtracts
        ("10 - \N{MINUS SIGN}3", "-3"),
        ("it is .5.", "0.5"),
        ("version 2.", "2"),
        ("about 1.5e3, or 15E-1", "1.5"),
        ("#### 1e99999 2", "1"),  # no exponent of sense
        ("3em", "3"),
        ("no number", None),
        ("7 of them\n#### unknown", None),  # the result is what stands behind the mark
        ("", None),
    ],
)
def test_the_number_that_a_text_states(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_exact_numbers():
    answers = [" 42", "so 42.00", "1 + 41 = 42\n#### 42", "43", "none", "42", "0.1"]
    known = ["#### 42", 42, "it is 42", 42.0, "42", None, 0.1]
    assert exact_number(answers, answers, answer=known) == [1, 1, 1, 0, 0, None, 1]


@pytest.mark.parametrize("known", ["none", True, [42], float("nan")])
def test_a_row_without_a_number_is_named(known):
    with pytest.raises(UserError, match=r"column 'answer' is .*, which holds no number"):
        exact_number(["p"], ["42"], answer=[known])


def test_forms_are_those_of_whole_answers():
    fits = whole_pattern(r"<think>.*</think> \d+")
    answers = [" <think>a\nb</think> 7\n", "<think></think> 7, or 8", "7"]
    assert fits(answers, answers) == [1, 0, 0]
    within = length_within(2, 3)
    with pytest.raises(UserError, match=r"reward_pattern '\(': no regular expression"):
        whole_pattern("(")
    assert within(answers, [" a ", "ab", "abc\n", "abcd"]) == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"reward_function": ("pattern",)}, "reward_function pattern does nothing without reward_"),
        ({"reward_pattern": "a"}, "reward_pattern does nothing without reward_function pattern"),
        ({"reward_length": (1, 2)}, "reward_length does nothing without reward_function length"),
        ({"reward_function": ("length",), "reward_length": (3,)}, "reward_length is 3: give two"),
        ({"reward_function": ("length",), "reward_length": (3, 2)}, "reward_length is 3 2: give"),
        ({"reward_function": ("m:f", "m:f")}, "reward_function names m:f twice"),
        (
            {"reward_function": ("m:f", "m:g"), "reward_function_weight": (1.0,)},
            "reward_function_weight is 1.0: give one for each of the 2 functions",
        ),
    ],
)
def test_settings_that_contradict_each_other(given, words):
    with pytest.raises(UserError) as caught:
        RewardConfig(**given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_every_check_is_made_and_named_in_the_help():
    config = RewardConfig(
        ("length", "exact_number", "pattern"), reward_pattern="a", reward_length=(0, 9)
    )
    functions = load_functions(config)
    names = [function.name for function in functions]
    assert names == ["length", "exact_number", "pattern"]  # in the order that was asked for
    assert functions[1].columns.needed == ("answer",)
    flag = next(flag for flag in flags_of(RewardConfig) if flag.name == "reward_function")
    assert all(name in flag.help for name in names)
