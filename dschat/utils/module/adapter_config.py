"""Read PEFT's `adapter_config.json`; refuse options that change the result and are not read here.

The tensors' names say which layers carry an adapter, not `target_modules`, which may be a pattern.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dschat.errors import RepeatedKeyError, UserError, parse_json
from dschat.utils.bounded import TooMuchError, bounded
from dschat.utils.module.adapter_rows import TokenIndices, read_indices
from dschat.utils.module.lora_config import LoraConfig

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILE = "adapter_model.safetensors"
WEIGHT_FILES = (WEIGHT_FILE, "adapter_model.bin")
CAUSAL_LM, REWARD = "CAUSAL_LM", "SEQ_CLS"
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
_SECONDS, _BYTES = 5.0, 1e9  # for all patterns and one layer, which takes microseconds
UNDERSTOOD = {
    *("peft_type", "task_type", "base_model_name_or_path", "init_lora_weights"),
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "target_parameters", "trainable_token_indices"),
}
WITHOUT_EFFECT = {  # on what a trained adapter computes
    *("auto_mapping", "peft_version", "inference_mode", "lora_dropout", "ensure_weight_tying"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
REFUSED = {
    "bias": "it trained biases of the base",
    "lora_bias": "B has a bias",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it is on after certain tokens only",
    "use_qalora": "it pools the input of A",
    "use_bdlora": "its matrices are block-diagonal",
    "megatron_config": "it is for layers split among devices",
    "revision": "of the base only the default revision is read",
}


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's folder (or the hub's files of one, cached), and what its config says.

    Attributes:
        name: what messages call it. base: what it sits on, a folder or hub id.
        task: CAUSAL_LM, SEQ_CLS, or None where PEFT was given none.
        rank_pattern, alpha_pattern: ranks and alphas of layers that differ from `lora`'s.
        target_parameters: names, or their ends, of parameters adapted without a layer.
        token_indices: tokens of which rows trained.
    """

    name: str
    folder: Path
    base: str
    task: str | None
    lora: LoraConfig
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()
    token_indices: TokenIndices = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.lora.lora_dim, *self.rank_pattern.values()):
            if replace(self.lora, lora_dim=rank).lora_dim == 0:
                raise ValueError(f"r is {rank}")
        for alpha in self.alpha_pattern.values():
            replace(self.lora, lora_alpha=alpha)  # it checks itself
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{pattern!r:.80} is no pattern of names: {error}") from error

    def of_layer(self, layer: str) -> LoraConfig:
        """Return the settings of the layer of this name: its own rank and alpha.

        Raises:
            UserError: matching a pattern to it does not end.
        """
        if not (self.rank_pattern or self.alpha_pattern):
            return self.lora
        problem = f"adapter {self.name}: rank_pattern or alpha_pattern of {CONFIG_FILE} does not"
        problem += f" come to an end for {layer}; write simpler ones, or save the adapter again"
        try:
            with bounded(_SECONDS, _BYTES, problem):
                rank = _by_pattern(self.rank_pattern, layer, self.lora.lora_dim)
                alpha = _by_pattern(self.alpha_pattern, layer, self.lora.lora_alpha)
        except TooMuchError as error:
            raise UserError(problem) from error
        return replace(self.lora, lora_dim=rank, lora_alpha=alpha)

    def targets_parameter(self, name: str) -> bool:
        """Return whether a bare parameter is adapted."""
        return any(name == t or name.endswith(f".{t}") for t in self.target_parameters)

    def trains_fully(self, name: str) -> bool:
        """Return whether a module or parameter is, or is in, one of `modules_to_save`."""
        parts, trained = name.split("."), self.lora.modules_to_save
        ancestors = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        return any(a == m or a.endswith(f".{m}") for a in ancestors for m in trained)


def _by_pattern(patterns: dict[str, Any], layer: str, default: Any) -> Any:
    """Follow PEFT's rule: the first key that, as a pattern, matches the name or its end."""
    matching = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(matching, default)


def read_config(folder: Path, name: str) -> AdapterConfig:
    """Read and check a folder's `adapter_config.json`; `name` is its name in messages.

    Raises:
        UserError: unreadable, not LoRA, no base named, or an option that is not supported.
    """
    try:
        text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
        raw = parse_json(text)
        kind, base = raw.get("peft_type"), raw.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "not a JSON object"
        if isinstance(error, RepeatedKeyError):
            reason = str(error)
        raise UserError(
            f"adapter {name}: {CONFIG_FILE} cannot be read ({reason}); save the adapter again"
        ) from error
    if kind != "LORA":
        raise UserError(
            f"adapter {name}: peft_type is {kind!r}, only LORA can be read; merge it with PEFT and "
            "give the merged folder"
        )
    if not base or not isinstance(base, str):
        raise UserError(
            f"adapter {name}: names no base; set base_model_name_or_path in its {CONFIG_FILE}"
        )
    if not any((folder / file).is_file() for file in WEIGHT_FILES):
        raise UserError(f"adapter {name}: holds no {WEIGHT_FILE}; copy the complete folder")
    _refuse(raw, name)
    try:
        return _from_peft(raw, folder, name)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"adapter {name}: {CONFIG_FILE} is malformed ({error}); save the adapter again"
        ) from error


def _from_peft(raw: dict[str, Any], folder: Path, name: str) -> AdapterConfig:
    """Take PEFT's fields; its defaults stand for what is not given."""
    lora = LoraConfig(
        lora_dim=raw.get("r", 8),
        lora_alpha=float(raw.get("lora_alpha", 8)),
        use_rslora=raw.get("use_rslora") or False,
        use_dora=raw.get("use_dora") or False,
        modules_to_save=tuple(raw.get("modules_to_save") or ()),
    )
    return AdapterConfig(
        name=name,
        folder=folder,
        base=raw["base_model_name_or_path"],
        task=raw.get("task_type"),
        lora=lora,
        rank_pattern=dict(raw.get("rank_pattern") or {}),
        alpha_pattern=dict(raw.get("alpha_pattern") or {}),
        target_parameters=tuple(raw.get("target_parameters") or ()),
        token_indices=read_indices(raw.get("trainable_token_indices")),
    )


def _refuse(raw: dict[str, Any], name: str) -> None:
    """Refuse options by which a layer computes something else than W + s B A."""
    remedy = "merge it with PEFT and give the merged folder"
    start = raw.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in PLAIN_STARTS):
        raise UserError(
            f"adapter {name}: init_lora_weights {start!r} changes the base's weights, and the "
            f"folder does not hold the changed ones; {remedy}"
        )
    if raw.get("task_type") not in (None, CAUSAL_LM, REWARD):
        raise UserError(
            f"adapter {name}: task_type is {raw['task_type']!r}; give one of {CAUSAL_LM} or of "
            f"{REWARD} with one label"
        )
    for key, value in raw.items():
        if key not in UNDERSTOOD | WITHOUT_EFFECT and value and value != "none":
            reason = REFUSED.get(key, "this option is not supported here")
            raise UserError(f"adapter {name}: {key} is {value!r}: {reason}; {remedy}")
