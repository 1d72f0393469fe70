"""The optimizer block of a user's DeepSpeed JSON, held against the settings."""

from __future__ import annotations

from dschat.errors import UserError, brief
from dschat.lazy import torch
from dschat.utils.ds_json import read_user_config
from dschat.utils.optim_config import OptimizerConfig

# Parameters of DeepSpeed's Adam that torch's has not.
OF_DEEPSPEED = {
    *("torch_adam", "adam_w_mode", "adamw_mode", "bias_correction", "set_grad_none"),
    "fp32_optimizer_states",
}


def check_optimizer_block(path: str, config: OptimizerConfig) -> None:
    """Stop before weights are loaded where the JSON's optimizer contradicts the settings.

    Raises:
        UserError: it does, or no optimizer is made of its type and parameters.
    """
    block = read_user_config(path).get("optimizer")
    if block is not None:
        params = {k: v for k, v in block.get("params", {}).items() if v != "auto"}
        block = {**block, "params": params}
        complete_optimizer_block(block, config, path)
        _check_made(block["type"], block["params"], path)


def _check_made(name: str, params: dict, path: str) -> None:
    """Make an optimizer of the block for a tensor of one value, where torch has such a one."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    place = f"deepspeed_config {path}: optimizer"
    is_adam = name.lower() in ("adam", "adamw")
    made = torch.optim.AdamW if is_adam else getattr(torch.optim, name, None)
    if made is None and name.lower() not in DEEPSPEED_OPTIMIZERS:
        known = ", ".join(DEEPSPEED_OPTIMIZERS)
        raise UserError(f"{place}: type {name!r} is unknown; take one of {known}")
    if made is None:
        return
    own = {k: v for k, v in params.items() if not (is_adam and k in OF_DEEPSPEED)}
    try:
        made([torch.zeros(1, requires_grad=True)], **own)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}.params: {name} refuses them ({brief(error)})") from error


def complete_optimizer_block(block: dict, config: OptimizerConfig, path: str | None) -> None:
    """Fill in what the JSON leaves open; refuse rates that the groups would silently override.

    Raises:
        UserError: no type, or a rate or weight decay that contradicts its setting.
    """
    if not isinstance(block.get("type"), str):
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
