"""A weight W + s P Q that computes with its parts: the sum is made only where nothing else will do.

Experts of a mixture keep their matrices in one 3-D parameter and multiply by it in ways of their
own (an index of one expert, a batch of gathered ones, one grouped product). A `LowRankWeight` takes
the parameter's place while such a forward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

GROUPED_MULTIPLE = 8  # ranks that grouped kernels take: rows of 16 bytes in half precision
LINEAR = torch._C._nn.linear  # what F.linear is, unless someone has replaced it
PRODUCTS = (torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__)
GROUPED = (F.grouped_mm, torch._grouped_mm, torch.ops.transformers.grouped_mm_fallback)


class LowRankWeight:
    """W + s P Q in place of a tensor: W (..., m, n), P (..., m, r), Q (..., r, n).

    W may be such a sum itself.
    Products with it, and `F.linear`, add the product of the factors; indices and transposes apply
    to all three. Whatever else is asked of it is asked of the dense sum.
    """

    def __init__(
        self, W: torch.Tensor | LowRankWeight, P: torch.Tensor, Q: torch.Tensor, scaling: float
    ):
        self.W, self.P, self.Q, self.scaling = W, P, Q, scaling
        self.dtype: torch.dtype = W.dtype
        self.device: torch.device = W.device
        self.shape: torch.Size = W.shape
        self.ndim: int = W.ndim
        self._each: list[LowRankWeight] | None = None

    def dense(self) -> torch.Tensor:
        """Return the sum."""
        W = self.W.dense() if isinstance(self.W, LowRankWeight) else self.W
        return W + self.scaling * (self.P @ self.Q)

    def __getattr__(self, name: str) -> Any:
        """Take any other attribute from the sum."""
        return getattr(self.dense(), name)

    def __len__(self) -> int:
        """Return the size of the first axis."""
        return len(self.W)

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., m, n) @ x."""
        return self._before(torch.matmul, x)

    def __getitem__(self, index: Any) -> Any:
        """Select by the first axis: one expert by its number, or several by a tensor of numbers."""
        if self.ndim == 3 and isinstance(index, torch.Tensor) and index.dtype == torch.long:
            if index.ndim == 0:
                return self.unbind()[int(index)]
            return LowRankWeight(self.W[index], self.P[index], self.Q[index], self.scaling)
        if self.ndim == 3 and isinstance(index, int):
            return self.unbind()[index]
        return self.dense()[index]

    def unbind(self) -> list[LowRankWeight]:
        """Split by the first axis, once: the parts' gradient is one tensor, not one an index."""
        if self._each is None:
            weights: Sequence[Any] = self.W.unbind()
            parts = zip(weights, self.P.unbind(), self.Q.unbind(), strict=True)
            self._each = [LowRankWeight(*part, self.scaling) for part in parts]
        return self._each

    @property
    def mT(self) -> LowRankWeight:
        """The transpose of the last two axes."""
        return LowRankWeight(self.W.mT, self.Q.mT, self.P.mT, self.scaling)

    def transpose(self, first: int, second: int) -> LowRankWeight | torch.Tensor:
        """Swap two axes."""
        if {first % self.ndim, second % self.ndim} == {self.ndim - 2, self.ndim - 1}:
            return self.mT
        return self.dense().transpose(first, second)

    @property
    def T(self) -> LowRankWeight | torch.Tensor:
        """The transpose of a matrix."""
        return self.transpose(0, -1)

    def _after(self, product: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., m) times the weight, by any product of two tensors."""
        y = product(x, self.W, *args, **kwargs)
        down = product(x, self.P, *args, **kwargs) * self.scaling
        return y + product(down, self.Q, *args, **kwargs)

    def _before(self, product: Callable, x: torch.Tensor) -> torch.Tensor:
        """The weight times x (..., n, k)."""
        return product(self.W, x) + product(self.P, product(self.Q, x) * self.scaling)

    def _padded(self) -> LowRankWeight:
        """Lay the factors out in rows of a rank that grouped kernels take, zeros at their end."""
        more = -self.P.shape[-1] % GROUPED_MULTIPLE
        P, Q = (F.pad(factor, (0, more)).contiguous() for factor in (self.P, self.Q.mT))
        return LowRankWeight(self.W, P, Q.mT, self.scaling)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute `function(*args, **kwargs)` from the parts where it is a product."""
        kwargs = dict(kwargs or {})
        x, weight = (*args, None, None)[:2]
        if isinstance(weight, cls) and isinstance(x, torch.Tensor):
            if function is LINEAR:
                bias = kwargs.get("bias", (*args, None)[2])
                y = weight.mT._after(torch.matmul, x)
                return y if bias is None else y + bias
            if function in PRODUCTS:
                return weight._after(torch.matmul, x)
            if function in GROUPED:
                return weight._padded()._after(function, x, *args[2:], **kwargs)
        if isinstance(x, cls) and isinstance(weight, torch.Tensor) and function in PRODUCTS:
            return x._before(torch.matmul, weight)
        args = [a.dense() if isinstance(a, cls) else a for a in args]
        kwargs = {k: v.dense() if isinstance(v, cls) else v for k, v in kwargs.items()}
        return function(*args, **kwargs)
