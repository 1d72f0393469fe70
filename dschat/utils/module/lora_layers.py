"""The layers of LoRA: y = x W^T + b + s * B A dropout(x), after Hu et al. 2021 (arXiv:2106.09685).

The names are the paper's: `lora_A` is (r, in) and is applied first, `lora_B` is (out, r). A layer
keeps `weight` and `bias` under the names of the layer it replaces, so that a state dict without its
`lora_` entries is the base model's own. With DoRA (arXiv:2402.09353) the rows of W + s B A are
rescaled to the trained lengths `lora_magnitude`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.low_rank import LoRAMatmul, affine, draw_adapter, merged_weight
from dschat.utils.zero import full_shape, gathered

ROWS_AT_ONCE = 1024  # of a weight in fp32, where DoRA measures its rows


class LoRALayer(nn.Module):
    """Base of all that carries an adapter: frozen weights, a scaling, a switch, a way to merge.

    Attributes:
        adapted: leaf names of the weights that the adapter changes.
    """

    adapted: tuple[str, ...]
    adapter_enabled: bool
    scaling: float
    rank: int

    @property
    def adapter(self) -> dict[str, nn.Parameter]:
        """Trained parameters by leaf name."""
        own = self.named_parameters(recurse=False)
        return {name: p for name, p in own if name.startswith("lora_")}

    @abstractmethod
    def merged(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Merge the adapter into copies of the weights, in fp32 and cast once.

        Args:
            tensors: the weights and the adapter by leaf name, complete, not shards.

        Returns:
            The weights by leaf name, each in its layout and dtype: W + s B A.
        """

    @abstractmethod
    def without_adapter(self) -> nn.Module:
        """Return a layer of the original kind on the same weights."""


class LoRAWeight(LoRALayer):
    """An adapted layer of one `weight`.

    Attributes:
        A_NAME, B_NAME: the leaf names of A (r, in) and B (out, r).
        transposed: True where `weight` is stored as (in, out).
    """

    adapted = ("weight",)
    A_NAME, B_NAME = "lora_A", "lora_B"
    MAGNITUDE_NAME = "lora_magnitude"
    weight: nn.Parameter
    lora_magnitude: nn.Parameter | None

    def __init__(
        self, base: nn.Linear | Conv1D | nn.Embedding, config: LoraConfig, transposed: bool
    ):
        super().__init__()
        self.transposed = transposed
        rows, columns = full_shape(base.weight)
        self.in_features, self.out_features = (rows, columns) if transposed else (columns, rows)
        self.scaling, self.init, self.rank = config.scaling, config.lora_init, config.lora_dim
        self.adapter_enabled = True
        self._keep_weight(cast(nn.Parameter, base.weight), config)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.register_parameter(self.MAGNITUDE_NAME, None)

    def _keep_weight(self, weight: nn.Parameter, config: LoraConfig) -> None:
        """Hold the base's weight; here unchanged."""
        self.weight = weight

    def _add_adapter(self, config: LoraConfig, dtype: torch.dtype, device: torch.device) -> None:
        for name, shape in (
            (self.A_NAME, (config.lora_dim, self.in_features)),
            (self.B_NAME, (self.out_features, config.lora_dim)),
        ):
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
        draw_adapter(self.A, self.B, self.init)
        if config.use_dora:
            with gathered([*self.parameters(recurse=False)]):
                lengths = self.row_lengths()
            self.lora_magnitude = nn.Parameter(lengths.to(dtype=dtype, device=device))

    @property
    def A(self) -> nn.Parameter:
        """lora_A (r, in), under the layer's name for it."""
        return getattr(self, self.A_NAME)

    @property
    def B(self) -> nn.Parameter:
        """lora_B (out, r), under the layer's name for it."""
        return getattr(self, self.B_NAME)

    def dense_weight(self) -> torch.Tensor:
        """Return the frozen weight that the layer computes with, in its stored layout."""
        return self.weight

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """View a stored weight as (out, in)."""
        return weight.t() if self.transposed else weight

    def merged(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Merge; with DoRA the sum is rescaled row by row."""
        weight = merged_weight(
            tensors["weight"],
            tensors[self.A_NAME],
            tensors[self.B_NAME],
            scaling=self.scaling,
            magnitude=tensors.get(self.MAGNITUDE_NAME),
            transposed=self.transposed,
        )
        return {"weight": weight}

    @torch.no_grad()
    def row_lengths(self) -> torch.Tensor:
        """Measure the rows of W + s B A, without a complete copy of W: (out,) fp32 lengths.

        A constant to the gradient, as DoRA's authors propose.
        """
        weight, lora_A = self.rows(self.dense_weight()), self.A.float()
        starts = range(0, self.out_features, ROWS_AT_ONCE)
        blocks = [slice(start, start + ROWS_AT_ONCE) for start in starts]
        rows = (
            torch.addmm(weight[b].to(lora_A), self.B[b].float(), lora_A, alpha=self.scaling)
            for b in blocks
        )
        return torch.cat([torch.linalg.vector_norm(block, dim=1) for block in rows])

    def rescaled(self, y: torch.Tensor) -> torch.Tensor:
        """Rescale (..., out) without bias by magnitude over present row length (DoRA)."""
        assert self.lora_magnitude is not None, "not a DoRA layer"
        return y * (self.lora_magnitude / self.row_lengths().to(y.dtype))

    def extra_repr(self) -> str:
        """Describe shapes and scaling for `print(model)`."""
        dora = ", DoRA" if self.lora_magnitude is not None else ""
        shape = f"in={self.in_features}, out={self.out_features}"
        return f"{shape}, r={self.rank}, s={self.scaling:g}{dora}"


class LoRALinear(LoRAWeight):
    """A linear layer (or GPT-2's Conv1D) with a frozen weight and a trainable low-rank update."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base: nn.Linear | Conv1D, config: LoraConfig):
        super().__init__(base, config, transposed=isinstance(base, Conv1D))
        self.bias = base.bias
        self._add_adapter(config, base.weight.dtype, base.weight.device)
        self.train(base.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        flat = x.reshape(-1, x.shape[-1])
        if not self.adapter_enabled:
            y = self._base(flat, self.bias)
        elif self.lora_magnitude is None:
            y = self._update(flat, self.bias)
        else:
            y = self.rescaled(self._update(flat, None))
            y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def without_adapter(self) -> nn.Module:
        """Return an nn.Linear or Conv1D on the same weight and bias."""
        with torch.device("meta"):
            if self.transposed:
                layer: nn.Module = Conv1D(self.out_features, self.in_features)
            else:
                layer = nn.Linear(self.in_features, self.out_features, bias=False)
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    def _base(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(N, in) -> (N, out) by W."""
        return affine(x, self.weight, bias, self.transposed)

    def _update(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(N, in) -> (N, out) by W + s B A."""
        drops = self.training and getattr(self.dropout, "p", 0.0) > 0.0
        if not drops and self._can_run_in_one(bias):
            adapter = self.lora_A, self.lora_B, self.scaling
            return LoRAMatmul.apply(x, self.weight, bias, self.transposed, *adapter)
        # In this order, so that the backward pass frees what dropout keeps before it needs more.
        y = self._base(x, bias)
        down = F.linear(self.dropout(x), self.lora_A) * self.scaling
        return y.addmm_(down, self.lora_B.t())

    def _can_run_in_one(self, bias: torch.Tensor | None) -> bool:
        return not (self.weight.requires_grad or (bias is not None and bias.requires_grad))


class LoRAEmbedding(LoRAWeight):
    """An embedding with a frozen table and a trainable low-rank update of its rows.

    A is (r, vocabulary) and starts at zero, B is (width, r) and starts random, whichever matrix the
    config names: a row of the table moves only when its token occurs.
    """

    A_NAME, B_NAME = "lora_embedding_A", "lora_embedding_B"
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    def __init__(self, base: nn.Embedding, config: LoraConfig):
        super().__init__(base, config, transposed=True)
        self.init = "B"
        self.padding_idx = base.padding_idx
        self._add_adapter(config, base.weight.dtype, base.weight.device)
        self.train(base.training)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) ids -> (..., width)."""
        y = F.embedding(ids, self.weight, self.padding_idx)
        if not self.adapter_enabled:
            return y
        down = F.embedding(ids, self.lora_embedding_A.t(), self.padding_idx)  # (..., r)
        y = y + F.linear(down, self.lora_embedding_B) * self.scaling
        return y if self.lora_magnitude is None else self.rescaled(y)

    def without_adapter(self) -> nn.Module:
        """Return an nn.Embedding on the same table."""
        with torch.device("meta"):
            layer = nn.Embedding(self.in_features, self.out_features, self.padding_idx)
        layer.weight = self.weight
        return layer
