"""Choose the layers that get adapters and the modules that train fully, by their names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.errors import UserError
from dschat.utils.module.lora_config import ALL_LINEAR, LoraConfig

REWARD_HEADS = ("v_head", "reward_head", "score")  # of one row: they train fully
HEAD_NAMES = ("lm_head", "embed_out", *REWARD_HEADS)


def match_layers(model: nn.Module, config: LoraConfig) -> list[str]:
    """Name the layers that get adapters, by `lora_module_name`.

    It holds substrings of the full names of linear layers; `all-linear` for all of them but the
    output head; the end of an embedding's name (`embed_tokens`) for its table. What
    `modules_to_save` trains fully gets no adapter. Only names, types and identity of the model's
    modules are read, so `meta` will do.

    Raises:
        UserError: nothing matches (the message lists what could), or an embedding does more than
            look up rows.
    """
    names, modules = config.lora_module_name, dict(model.named_modules())
    trained = fully_trained_modules(model, config.modules_to_save)
    free = {
        name: m
        for name, m in modules.items()
        if not any(name == t or name.startswith(f"{t}.") for t in trained)
        and name.split(".")[-1] not in REWARD_HEADS
    }
    heads = {id(output_head(m)) for m in modules.values()} - {id(None)}
    linear = [n for n, m in free.items() if isinstance(m, (nn.Linear, Conv1D))]
    body = [n for n in linear if n.split(".")[-1] not in HEAD_NAMES and id(free[n]) not in heads]
    embeddings = [n for n, m in free.items() if isinstance(m, nn.Embedding)]
    matched = [
        *(n for n in linear if any(_names_linear(part, n, n in body) for part in names)),
        *(n for n in embeddings if any(_ends_with(n, part) for part in names)),
    ]
    if not matched:
        raise UserError(_no_match(names, body, embeddings))
    for name in matched:
        module = free[name]
        if isinstance(module, nn.Embedding) and (
            type(module).forward is not nn.Embedding.forward or module.max_norm is not None
        ):
            raise UserError(
                f"lora_module_name: {name} ({type(module).__name__}) does more than look up rows, "
                f"so no adapter can go on it; train it fully with modules_to_save {name}"
            )
    return matched


def _names_linear(part: str, name: str, in_body: bool) -> bool:
    return in_body if part == ALL_LINEAR else part in name


def _ends_with(name: str, part: str) -> bool:
    return name == part or name.endswith(f".{part}")


def _no_match(names: tuple[str, ...], body: list[str], embeddings: list[str]) -> str:
    leaves = ", ".join(sorted({n.split(".")[-1] for n in body})) or "none"
    tables = ", ".join(sorted({n.split(".")[-1] for n in embeddings})) or "none"
    example = f" (a full name: {body[0]})" if body else ""
    return (
        f"lora_module_name {' '.join(names)!r} matches no layer: use all-linear, or part of a "
        f"layer's name; this model's linear layers are {leaves}{example}, its embeddings {tables}"
    )


def fully_trained_modules(model: nn.Module, modules_to_save: Iterable[str]) -> list[str]:
    """Name the modules that train fully; each entry is a module's full name or the end of one.

    A reward or value head trains fully in any case; naming it is allowed.

    Raises:
        UserError: an entry names no module (the message lists what could).
    """
    trained: list[str] = []
    modules = [name for name, m in model.named_modules() if name and [*m.parameters()]]
    has_head = any(name.split(".")[-1] in REWARD_HEADS for name in modules)
    for part in modules_to_save:
        matched = [name for name in modules if _ends_with(name, part)]
        if not matched and not (part in REWARD_HEADS and has_head):
            leaves = dict.fromkeys(n.split(".")[-1] for n in modules)
            some = ", ".join(leaf for leaf in leaves if not leaf.isdigit())
            raise UserError(
                f"modules_to_save {part!r} names no module: give a module's name or its end; "
                f"this model has {some}"
            )
        trained += matched
    return trained


def output_head(module: nn.Module) -> nn.Module | None:
    """Return the output head that a `transformers` model names; None for any other module."""
    getter = getattr(module, "get_output_embeddings", None)
    return getter() if getter is not None else None
