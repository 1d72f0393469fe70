"""Layers of a decoder that a plan runs in place of all: a few of each kind.

Layers are of one kind where their classes, the names and shapes of their weights, and what the
config lists for each layer are the same: sliding and full attention, dense layers and experts.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

FIRST, FURTHER = 3, 2  # of the first kind, whose first layer has none before it, and of others
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop")

Kind = tuple
Build = Callable[[PretrainedConfig], nn.Module]


@dataclass(frozen=True)
class Layers:
    """A model of those layers that run.

    Attributes:
        config: of that model. running: the kind of each layer of it. counts: of all layers' kinds.
    """

    config: PretrainedConfig
    running: list[Kind]
    counts: Counter[Kind]


def layers_to_run(config: PretrainedConfig, build: Build) -> Layers:
    """Choose a few layers of each kind, where the family's model can be made of them.

    Some families make a layer what it is by its place: then all layers up to a place run, or all.
    """
    kinds = _kinds(config, build, _listed(config))
    few = _few(kinds)
    for chosen in (few, range(1 + few[-1])) if few else ():
        expected = [kinds[place] for place in chosen]
        with contextlib.suppress(Exception):  # whatever a family's code does with fewer layers
            short = with_layers(config, chosen)
            if _kinds(short, build, _listed(config)) == expected:
                return Layers(short, expected, Counter(kinds))
    return Layers(without_attention_dropout(config), kinds, Counter(kinds))


def _few(kinds: Sequence[Kind]) -> list[int]:
    """Places of the first layers of each kind, in order."""
    seen: Counter[Kind] = Counter()
    chosen = []
    for place, kind in enumerate(kinds):
        seen[kind] += 1
        if seen[kind] <= (FIRST if kind == kinds[0] else FURTHER):
            chosen.append(place)
    return chosen


def _listed(config: PretrainedConfig) -> list[str]:
    """Names of what the config says of each layer."""
    text = config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    said = {"layer_types": getattr(text, "layer_types", None)} | vars(text)
    return [
        name
        for name, each in said.items()
        if isinstance(each, list) and len(each) == count and not name.startswith("_")
    ]


def _kinds(config: PretrainedConfig, build: Build, listed: Sequence[str]) -> list[Kind]:
    """The kind of each layer of the model that a config makes."""
    with torch.device("meta"):
        layers = decoder_layers(build(copy.deepcopy(config)), config)
    text = config.get_text_config()
    said = [getattr(text, name) for name in listed]
    return [
        (type(layer), *map(str, told), *((name, p.shape) for name, p in layer.named_parameters()))
        for layer, *told in zip(layers, *said, strict=True)
    ]


def decoder_layers(module: nn.Module, config: PretrainedConfig) -> list[nn.Module]:
    """The stack of as many layers as the config says, else the one with most weights."""
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    stacks = [part for part in module.modules() if isinstance(part, nn.ModuleList)]

    def size(stack: nn.ModuleList) -> tuple[bool, int]:
        return len(stack) == count, sum(p.numel() for p in stack.parameters())

    return list(max(stacks, key=size, default=()))


def with_layers(config: PretrainedConfig, places: Sequence[int]) -> PretrainedConfig:
    """Copy a config with the layers of these places alone, and next to no tower for images."""
    short = without_attention_dropout(config)
    text, listed = short.get_text_config(), _listed(config)
    # Sizes of layers that are not as the others, by place.
    own = {int(at): sizes for at, sizes in text.to_dict().get("per_layer_config", {}).items()}
    text.per_layer_config = None
    for name in listed:
        with contextlib.suppress(AttributeError):  # that the config works out itself
            setattr(text, name, [getattr(text, name)[place] for place in places])
    text.num_hidden_layers = len(places)
    if own:
        text.per_layer_config = {at: own[old] for at, old in enumerate(places) if old in own}
    vision = getattr(short, "vision_config", None)
    if vision is not None:
        vision.num_hidden_layers = 1
    return short


def without_attention_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Copy a config; with dropout inside the attention a CPU's kernels keep all scores."""
    copied = copy.deepcopy(config)
    text = copied.get_text_config()
    for name in ATTENTION_DROPOUT:
        if hasattr(text, name):
            setattr(text, name, 0.0)
    return copied
