"""The random generators of a process, for its checkpoint."""

from __future__ import annotations

import random
from typing import Any, cast

from dschat.lazy import np, torch


class RandomState:
    """The generators of this process: python, numpy, torch, and this rank's device."""

    per_rank = True

    def state_dict(self) -> dict[str, Any]:
        """Return the generators' states as tensors and plain numbers."""
        from deepspeed.accelerator import get_accelerator

        name, words, *rest = cast(tuple[Any, ...], np.random.get_state())
        return {
            "python": random.getstate(),
            "numpy": (name, torch.from_numpy(words.astype(np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "device": get_accelerator().get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the generators to states that `state_dict` returned."""
        from deepspeed.accelerator import get_accelerator

        name, words, *rest = state["numpy"]
        random.setstate(state["python"])
        np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        get_accelerator().set_rng_state(state["device"])
