"""Choose what gets adapters and what trains fully, by name; say what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from dschat.errors import UserError
from dschat.utils.module.experts import bare_weights, check_plain, is_bypassed, is_plain_linear
from dschat.utils.module.fixed_update import FixedUpdate
from dschat.utils.module.lora_config import ALL_LINEAR, LoraConfig
from dschat.utils.module.lora_layers import LoRAEmbedding, LoRALayer
from dschat.utils.module.quantized import QuantizedLoRALinear
from dschat.utils.zero import full_numel, full_shape

REWARD_HEADS = ("v_head", "reward_head", "score")  # of one row: they train fully
HEAD_NAMES = ("lm_head", "embed_out", *REWARD_HEADS)


def match_layers(model: nn.Module, config: LoraConfig) -> list[str]:
    """Name the layers, and the weights of experts and routers, that get adapters.

    `lora_module_name` holds substrings of their full names; `all-linear` for all of them but the
    output head; the end of an embedding's name (`embed_tokens`) for its table. What
    `modules_to_save` trains fully gets no adapter. Only names, types, shapes and identity of the
    model's modules are read, so `meta` will do.

    Raises:
        UserError: nothing matches (the message lists what could), an embedding does more than look
            up rows, or a setting that adapters on experts cannot follow.
    """
    names, modules = config.lora_module_name, dict(model.named_modules())
    trained = fully_trained_modules(model, config.modules_to_save)
    free = {
        name: m
        for name, m in modules.items()
        if not any(name == t or name.startswith(f"{t}.") for t in trained)
        and name.split(".")[-1] not in REWARD_HEADS
        and not is_bypassed(modules, name)
    }
    no_heads = free.keys() - _output_heads(modules)
    linear = [n for n, m in free.items() if is_plain_linear(m)]
    weights = [n for n in bare_weights(modules) if n.rpartition(".")[0] in no_heads]
    embeddings = [n for n, m in free.items() if isinstance(m, nn.Embedding)]
    usual = dict.fromkeys([*(n for n in linear if n in no_heads), *weights])  # all-linear
    matched = [
        n
        for n in (*linear, *weights)
        if (ALL_LINEAR in names and n in usual) or any(part in n for part in names)
    ]
    matched += [n for n in embeddings if any(_ends_with(n, part) for part in names)]
    if not matched:
        raise UserError(_no_match(names, [*usual], embeddings))
    for name in matched:
        if name in embeddings:
            _check_lookup(name, free[name])
        elif name in weights:
            check_plain(config, name)
    return matched


def _output_heads(modules: Mapping[str, nn.Module]) -> set[str]:
    """Name the output heads: by convention, or because a model says so."""
    said = {id(output_head(m)) for m in modules.values()} - {id(None)}
    return {n for n, m in modules.items() if n.split(".")[-1] in HEAD_NAMES or id(m) in said}


def _check_lookup(name: str, module: nn.Module) -> None:
    assert isinstance(module, nn.Embedding)
    if type(module).forward is not nn.Embedding.forward or module.max_norm is not None:
        raise UserError(
            f"lora_module_name: {name} ({type(module).__name__}) does more than look up rows, so "
            f"no adapter can go on it; train it fully with modules_to_save {name}"
        )


def _ends_with(name: str, part: str) -> bool:
    return name == part or name.endswith(f".{part}")


def _no_match(names: tuple[str, ...], usual: list[str], embeddings: list[str]) -> str:
    leaves = ", ".join(sorted({n.split(".")[-1] for n in usual})) or "none"
    tables = ", ".join(sorted({n.split(".")[-1] for n in embeddings})) or "none"
    example = f" (a full name: {usual[0]})" if usual else ""
    return (
        f"lora_module_name {' '.join(names)!r} matches no layer: use all-linear, or part of a "
        f"layer's name; this model's linear layers are {leaves}{example}, its embeddings {tables}"
    )


def left_without_adapter(model: nn.Module, config: LoraConfig) -> list[str]:
    """Describe in one line the matrices without adapters; None where there are none, or no LoRA.

    Args:
        model: with its adapters; embeddings and output heads do not count.
    """
    modules = dict(model.named_modules())
    heads, total, left = _output_heads(modules), 0, Counter[str]()
    for name, module in modules.items():
        if isinstance(module, (nn.Embedding, LoRAEmbedding, FixedUpdate)) or name in heads:
            continue
        if isinstance(module, QuantizedLoRALinear):
            total += module.weight_numel  # packed, it is no parameter
        adapted = module.adapted if isinstance(module, LoRALayer) else ()
        for leaf, parameter in module.named_parameters(recurse=False):
            is_matrix = sum(size > 1 for size in full_shape(parameter)) > 1
            if not is_matrix or leaf.startswith("lora_") or leaf.endswith("bias"):
                continue
            total += full_numel(parameter)
            if leaf not in adapted and not parameter.requires_grad:
                left[short_name(f"{name}.{leaf}")] += full_numel(parameter)
    if config.lora_dim == 0 or not left:
        return []
    return [
        f"{' '.join(config.lora_module_name)} leaves {left.total():,} parameters "
        f"({100 * left.total() / total:.1f} % of the matrices outside embeddings and head) "
        f"without adapters: {', '.join(left)}"
    ]


def short_name(name: str) -> str:
    """Name a layer or weight without its place: `mlp.gate` for `model.layers.0.mlp.gate.weight`."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join([part for part in parts if not part.isdigit()][-2:])


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
