"""The optimizer block of a user's DeepSpeed JSON, held against the settings."""

from __future__ import annotations

from dschat.errors import UserError
from dschat.utils.ds_json import read_user_config
from dschat.utils.optim_config import OptimizerConfig


def check_optimizer_block(path: str, config: OptimizerConfig) -> None:
    """Stop before weights are loaded where the JSON's optimizer contradicts the settings."""
    block = read_user_config(path).get("optimizer")
    if block is not None:
        params = {k: v for k, v in block.get("params", {}).items() if v != "auto"}
        complete_optimizer_block({**block, "params": params}, config, path)


def complete_optimizer_block(block: dict, config: OptimizerConfig, path: str | None) -> None:
    """Fill in what the JSON leaves open; refuse rates that the groups would silently override.

    Raises:
        UserError: no type, or a rate or weight decay that contradicts its setting.
    """
    if "type" not in block:
        raise UserError(f"deepspeed_config {path}: the optimizer block names no type: add one")
    params = block.setdefault("params", {})
    settings = {
        "lr": ("learning_rate", config.base_rate),
        "weight_decay": ("weight_decay", config.weight_decay),
    }
    for name, (setting, value) in settings.items():
        if params.setdefault(name, value) != value:
            raise UserError(
                f"deepspeed_config {path}: optimizer.params.{name} {params[name]} contradicts "
                f'{setting} {value}, which the groups carry; make them equal or write "auto"'
            )
    if block["type"].lower() in ("adam", "adamw"):
        params.setdefault("betas", list(config.betas))
        params.setdefault("eps", config.eps)
