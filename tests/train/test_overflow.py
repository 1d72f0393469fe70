"""fp16 may skip steps whose gradients overflow, some in a row; then the run ends in one line.

The engine is a stub: no CPU trains in fp16. The loss scaler is DeepSpeed's own.
"""

from types import SimpleNamespace

import pytest
from deepspeed.runtime.fp16 import loss_scaler

from dschat.errors import UserError
from dschat.train.overflow import limit_skips, skips


class Fp16Engine:
    """Steps of which some overflow, under a dynamic loss scale."""

    def __init__(self, overflows: list[bool], scale: float = 2.0**40):
        self.overflows, self.skipped_steps, self.applied = iter(overflows), 0, True
        self.scaler = loss_scaler.DynamicLossScaler(scale, 100, 1, 1, False)

    def step(self) -> None:
        overflow = next(self.overflows)
        self.scaler.update_scale(overflow)
        self.applied = not overflow
        self.skipped_steps += overflow

    def was_step_applied(self) -> bool:
        return self.applied

    def fp16_enabled(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(loss_scaler, "dist", SimpleNamespace(get_rank=lambda: 0))


def test_skips_in_a_row_end_the_run_and_others_do_not():
    engine = Fp16Engine([True, True, False, True, True, False, True, True, True])
    limit_skips(engine, 3, "step 1 (SFT)")
    for _ in range(8):
        engine.step()
    assert skips(engine) == {"skipped_steps": 6}
    with pytest.raises(UserError) as error:
        engine.step()
    assert str(error.value) == (
        "step 1 (SFT): gradients overflowed fp16 in the last 3 optimizer steps, and all were "
        "skipped (max_skipped_steps); use dtype bf16 or fp32, or lower learning rates"
    )


def test_a_loss_scale_that_cannot_fall_any_more_is_one_line_too():
    """From 4 to 2 to 1; there DeepSpeed raises an exception of no class."""
    engine = Fp16Engine([True] * 9, scale=4.0)
    limit_skips(engine, 50, "actor")
    engine.step()
    engine.step()
    with pytest.raises(UserError, match=r"actor: .* last 3 .* \(the loss scale is at its least\)"):
        engine.step()


def test_other_errors_of_a_step_pass():
    engine = Fp16Engine([])
    limit_skips(engine, 2, "actor")
    with pytest.raises(StopIteration):
        engine.step()


def test_nothing_is_counted_where_nothing_is_skipped():
    assert skips(SimpleNamespace(fp16_enabled=lambda: False)) == {}
