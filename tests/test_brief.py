"""The first line of an error, as messages quote it."""

import pytest

from dschat.errors import brief


@pytest.mark.parametrize(
    ("error", "line", "typed"),
    [
        (ValueError("\n first\nsecond"), "first", "ValueError: first"),
        (ValueError("wrong:\n  first\nsecond"), "wrong: first", "ValueError: wrong: first"),
        (KeyError(), "KeyError", "KeyError"),
    ],
)
def test_an_error_in_one_line(error, line, typed):
    assert brief(error) == line and brief(error, with_type=True) == typed
