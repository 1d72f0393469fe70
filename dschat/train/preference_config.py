"""Settings of learning from preferences without a reward model: the loss and its reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dschat.errors import UserError
from dschat.functional.preferences import PREFERENCE_LOSSES, PreferenceLoss
from dschat.settings import Settings, setting
from dschat.train.model_config import ModelConfig

ADAPTERS_OFF, PRECOMPUTED, NO_REFERENCE = "adapters_off", "precomputed", "none"


@dataclass(frozen=True)
class PreferenceConfig(Settings):
    """The preference loss, its coefficients, and where its reference comes from.

    A coefficient that is not given has the loss's own default; one that the loss does not have
    does nothing.
    """

    loss_type: str = setting(
        "sigmoid",
        "preference loss; default rates and coefficients are its own (ipo, simpo: half the rate)",
        choices=tuple(PREFERENCE_LOSSES),
    )
    beta: float | None = setting(
        None,
        "scale of the rewards; the larger, the closer to the reference (default: 0.1; simpo 2); "
        "of orpo the weight of the odds ratio beside the chosen answers' own loss (10)",
        above=0,
    )
    label_smoothing: float | None = setting(
        None,
        "share of labels taken for wrong, of sigmoid (conservative DPO), simpo and robust "
        "(default: 0; robust 0.1)",
        at_least=0,
        below=0.5,
    )
    simpo_gamma: float | None = setting(
        None, "margin between both rewards that simpo asks for (default: 1)", at_least=0
    )
    desirable_weight: float | None = setting(
        None, "weight of chosen answers in kto (default: 1)", above=0
    )
    undesirable_weight: float | None = setting(
        None, "weight of rejected answers in kto (default: 1)", above=0
    )
    reference: str = setting(
        "auto",
        "the policy that training starts from: the model with its adapters off, or log-"
        "probabilities computed before training and kept (default: adapters_off with LoRA)",
        choices=("auto", ADAPTERS_OFF, PRECOMPUTED),
    )

    @property
    def loss(self) -> PreferenceLoss:
        """The loss of `loss_type`."""
        return PREFERENCE_LOSSES[self.loss_type]

    @property
    def coefficients(self) -> dict[str, float]:
        """The loss's coefficients by name: the values given, else its defaults."""
        given = {name: getattr(self, name) for name in self.loss.defaults}
        return {n: self.loss.defaults[n] if x is None else x for n, x in given.items()}

    def choose_reference(self, model: ModelConfig) -> str:
        """Choose where the reference comes from for a model with its settings complete.

        Raises:
            UserError: adapters are to be switched off that are not there, or are not all that
                trains.
        """
        if not self.loss.needs_reference:
            return NO_REFERENCE
        if self.reference == ADAPTERS_OFF and not model.base_is_frozen:
            cause = (
                "without adapters (lora_dim 0) nothing can be switched off"
                if model.lora.lora_dim == 0
                else "with train_base_model or modules_to_save more than the adapters trains"
            )
            raise UserError(f"reference {ADAPTERS_OFF}: {cause}; use {PRECOMPUTED}")
        if self.reference == "auto":
            return ADAPTERS_OFF if model.base_is_frozen else PRECOMPUTED
        return self.reference

    def check_streaming(self, model: ModelConfig) -> None:
        """Raise an error where rows that are read only once cannot serve.

        Raises:
            UserError: naming the setting in the way.
        """
        if self.loss.needs_kl:
            raise UserError(
                f"streaming and loss_type {self.loss_type}: its distance is measured on answers to "
                "other prompts, which a stream has no way to; drop streaming"
            )
        if self.choose_reference(model) == PRECOMPUTED:
            raise UserError(
                "streaming: the reference's log-probabilities cannot be computed beforehand for "
                "rows that are not there yet; train adapters (lora_dim), or drop streaming"
            )

    def unused(self) -> Iterator[str]:
        """Yield a line for each setting that was given without effect."""
        names = ("beta", "label_smoothing", "simpo_gamma", "desirable_weight", "undesirable_weight")
        for name in names:
            if getattr(self, name) is not None and name not in self.loss.defaults:
                users = ", ".join(x.name for x in PREFERENCE_LOSSES.values() if name in x.defaults)
                yield (
                    f"--{name} does nothing: --loss_type {self.loss_type} has no such coefficient; "
                    f"of {users}"
                )
        if self.reference != "auto" and not self.loss.needs_reference:
            yield (
                f"--reference {self.reference} does nothing: --loss_type {self.loss_type} compares "
                "with no reference"
            )
        if self.loss_type == "robust" and self.label_smoothing == 0:
            yield "--loss_type robust does nothing: with --label_smoothing 0 it is sigmoid"
