"""Settings of training one model, and what they do to it before an engine is built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dschat.errors import UserError
from dschat.lazy import torch
from dschat.settings import Settings, group, setting
from dschat.train.adapter_ranks import adapted_shapes, beyond_rank
from dschat.utils.distributed import print_rank_0
from dschat.utils.ds_utils import ZERO_STAGES
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.untrained_rows import TokenChoice
from dschat.utils.optim_config import OptimizerConfig

if TYPE_CHECKING:
    from torch import nn

    from dschat.models.config import Build
    from dschat.train.disk import ModelSize

AUTO, NONE = ("auto",), ("none",)  # values of `trainable_tokens` beside lists of tokens

HEAD_ALONE_RATE = 2.0  # over the width, of a head on a frozen trunk: docs/reward_models.md


def freeze_trunk(module: nn.Module) -> None:
    """Make the head of a reward model trainable, and nothing else."""
    module.requires_grad_(False)
    module.get_submodule("v_head").requires_grad_(True)


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Settings of loading, sharding and training one model.

    Attributes:
        train_base: with adapters, train what they wrap as well; no flag, the run decides.
        head_only: freeze all but the head; no flag, the step decides.
        tokens: what `trainable_tokens` means for a tokenizer and its data; no flag.
    """

    zero_stage: int = setting(0, "ZeRO stage", choices=ZERO_STAGES)
    gradient_checkpointing: bool = setting(False, "recompute activations in backward")
    dropout: float | None = setting(None, "override every dropout probability", at_least=0, below=1)
    optimizer: OptimizerConfig = group(OptimizerConfig)
    lora: LoraConfig = group(LoraConfig)
    trainable_tokens: tuple[str, ...] = setting(
        AUTO,
        "with LoRA, tokens (or ids) whose rows of embedding and output head train; auto: the end "
        "token and the special tokens of the data, where their rows are new or untrained; none",
    )
    train_base: bool = False
    head_only: bool = False
    tokens: TokenChoice = TokenChoice()

    def __post_init__(self) -> None:
        super().__post_init__()
        names = " ".join(self.trainable_tokens)
        if self.trainable_tokens in (AUTO, NONE):
            return
        if {*AUTO, *NONE} & {*self.trainable_tokens}:
            raise UserError(f"trainable_tokens is {names}: give auto, none, or a list of tokens")
        if self.lora.lora_dim == 0 or self.train_base:
            cause = "with train_base_model" if self.train_base else "without adapters (lora_dim 0)"
            raise UserError(
                f"trainable_tokens {names}: {cause} every row trains; drop trainable_tokens"
            )

    @property
    def base_is_frozen(self) -> bool:
        """Tell whether switching the adapters off restores the model that training started from."""
        return self.lora.lora_dim > 0 and not self.train_base and not self.lora.modules_to_save

    def of_head_alone(self, width: int) -> ModelConfig:
        """The same for a head on a frozen trunk, at a rate that suits its width if none is given.

        An optimizer step of Adam moves a score by the rate times the sum of `width` features.
        """
        rates = self.optimizer
        if rates.learning_rate is None and rates.head_learning_rate is None:
            rates = replace(rates, head_learning_rate=HEAD_ALONE_RATE / width)
        return replace(self, optimizer=rates, head_only=True, gradient_checkpointing=False)

    def check(self, model_name_or_path: str, build: Build) -> ModelSize:
        """Refuse adapters and rows that do not fit the model, built on `meta`, without weights.

        Raises:
            UserError: no layer would get an adapter, or each would get one of too high a rank; or
                named tokens whose rows cannot train.
        """
        from dschat.models.config import on_meta
        from dschat.train.disk import ModelSize
        from dschat.utils.module.token_tables import check_tables

        module = on_meta(model_name_or_path, build)
        base = sum(parameter.numel() for parameter in module.parameters())
        if self.lora.lora_dim:
            shapes = adapted_shapes(module, self.lora)
            if line := beyond_rank(model_name_or_path, shapes, self.lora.lora_dim):
                print_rank_0(line)
            with torch.device("meta"):
                self._add_adapters(module, replace(self.lora, quantize_base=None))
        if self.head_only:
            freeze_trunk(module)
        if self.tokens.always:
            check_tables(self._tables(module))
        return ModelSize.of(module, base)

    def apply(self, module: nn.Module) -> nn.Module:
        """Add adapters, freeze the base, switch gradient checkpointing on, all in place."""
        if self.lora.lora_dim:
            self._add_adapters(module, self.lora)
            self._add_token_rows(module)
        return self._frozen_and_checkpointed(module)

    def _frozen_and_checkpointed(self, module: nn.Module) -> nn.Module:
        if self.head_only:
            freeze_trunk(module)
        if self.gradient_checkpointing:
            from dschat.utils.module.lora import make_model_gradient_checkpointing_compatible

            make_model_gradient_checkpointing_compatible(module)
        return module

    def apply_on_meta(self, module: nn.Module) -> nn.Module:
        """Do to a module without weights what `apply` does to one that has them.

        Rows of tokens are left out, which depend on values, and so is the packing of weights.
        """
        with torch.device("meta"):
            if self.lora.lora_dim:
                self._add_adapters(module, replace(self.lora, quantize_base=None))
        return self._frozen_and_checkpointed(module)

    def _add_adapters(self, module: nn.Module, lora: LoraConfig) -> None:
        from dschat.utils.module.lora import (
            convert_linear_layer_to_lora,
            only_optimize_lora_parameters,
        )

        convert_linear_layer_to_lora(module, lora)
        if self.train_base:
            module.requires_grad_(True)
        else:
            only_optimize_lora_parameters(module, lora.modules_to_save)

    def _tables(self, module: nn.Module) -> dict[str, nn.Module]:
        """Embedding and head by name, without what trains fully."""
        from dschat.utils.module.targets import fully_trained_modules
        from dschat.utils.module.token_tables import tables_of

        return tables_of(module, fully_trained_modules(module, self.lora.modules_to_save))

    def _add_token_rows(self, module: nn.Module) -> None:
        """Make rows of single tokens trainable where chosen, and print which."""
        tables = {} if self.train_base else self._tables(module)
        reasons = self.tokens.reasons(tables) if tables else {}
        if not reasons:
            if self.optimizer.trainable_tokens_learning_rate is not None:
                print_rank_0("trainable_tokens_learning_rate does nothing: no rows of tokens train")
            return
        from dschat.utils.module.token_tables import add_token_rows

        rows = self.tokens.described(reasons)
        try:
            add_token_rows(module, [*reasons], tables)
        except UserError as error:
            if self.tokens.always:
                raise
            print_rank_0(f"advice: {rows} cannot be learned; {error}")
        else:
            print_rank_0(f"trainable tokens in {' and '.join(tables)}: {rows}")
