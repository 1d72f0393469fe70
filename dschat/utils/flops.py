"""Floating-point operations of a decoder: the Megatron-paper formula and an exact count.

Two figures, never mixed:

- `calculate_flops` is the formula of the Megatron paper with the LoRA-aware activation factor, the
  figure that DeepSpeed-Chat prints. It knows layers, hidden size and vocabulary, nothing else.
- `model_flops` counts the matrix products of one architecture. Its `model` figure is the numerator
  of MFU; its `hardware` figure adds what gradient checkpointing computes twice.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from dschat.errors import UserError

# Whether the MLP of a model type has a gate (three matrices) or not (two). The count reads
# everything else from the config, which does not say this.
_GATED = "llama mistral qwen2 qwen3 gemma gemma2 phi3 smollm3 olmo olmo2 granite cohere stablelm"
_UNGATED = "opt gpt2 gpt_neo gpt_neox gptj bloom phi starcoder2"
GATED_MLP = dict.fromkeys(_GATED.split(), True) | dict.fromkeys(_UNGATED.split(), False)


class HfSizes(NamedTuple):
    """The three sizes that the Megatron formula takes from a model's config."""

    num_layers: int
    hidden_size: int
    vocab_size: int


def get_hf_configs(hf_config: Any) -> HfSizes:
    """Return layers, hidden size and vocabulary size of a `transformers` config.

    Raises UserError when the config names none of them.
    """
    return HfSizes(
        _size(hf_config, "num_hidden_layers", "n_layer", "num_layers"),
        _size(hf_config, "hidden_size", "n_embd"),
        _size(hf_config, "vocab_size"),
    )


def lora_overhead_factor(lora_dim: int, hidden_size: int) -> float:
    """Return k = 2 · lora_dim / hidden_size, an adapter's share of a square matrix's parameters.

    A (r, h) and B (h, r) hold 2rh parameters against h²; their weight gradients cost as much less.
    """
    if hidden_size <= 0:
        raise UserError(f"hidden_size {hidden_size}: give the model's width, at least 1")
    if lora_dim < 0:
        raise UserError(f"lora_dim {lora_dim}: give 0 for no LoRA, or a rank of at least 1")
    return 2 * lora_dim / hidden_size


def activation_factor(lora_dim: int, hidden_size: int, gradient_checkpointing: bool) -> float:
    """Return the cost of a training step in forward passes: 3 or 4, less (1 − k) with LoRA.

    One pass forward, one for input gradients, one for weight gradients, and one more when
    checkpointing computes the forward twice. LoRA leaves k of the weight gradients.
    OPT-1.3B (hidden 2048) with lora_dim 128: k = 0.125, so 2.125, or 3.125 with checkpointing.
    """
    k = lora_overhead_factor(lora_dim, hidden_size)
    passes = 4.0 if gradient_checkpointing else 3.0
    return passes - (1 - k) if lora_dim > 0 else passes


def calculate_flops(
    checkpoint_activations_factor: float, batch_size: float, seq_length: float, hf_config: Any
) -> float:
    """Return FLOPs per iteration, 24·f·B·s·l·h²·(1 + s/6h + V/16lh), over all GPUs.

    With f = 4 this is equation 3 of the Megatron paper (arXiv:2104.04473): full-square attention,
    MLP of width 4h, all heads their own keys. B·s is the global number of tokens.
    """
    if min(checkpoint_activations_factor, batch_size, seq_length) <= 0:
        raise UserError(
            f"factor {checkpoint_activations_factor}, batch {batch_size}, length {seq_length}: "
            "FLOPs need all three above 0"
        )
    layers, hidden, vocab = get_hf_configs(hf_config)
    tokens = batch_size * seq_length
    correction = 1 + seq_length / (6 * hidden) + vocab / (16 * layers * hidden)
    return 24 * checkpoint_activations_factor * tokens * layers * hidden**2 * correction


def has_exact_count(hf_config: Any) -> bool:
    """Return whether `ModelShape.from_config` knows this model type."""
    return hf_config.model_type in GATED_MLP


@dataclass(frozen=True)
class ModelShape:
    """The matrices of a decoder-only transformer, as its config gives them.

    `num_kv_heads` below `num_heads` is grouped-query attention. `embed_dim` is the width of the
    embedding and of the head's input; where it differs from `hidden_size` (OPT-350m) two
    projections join them. A head tied to the embedding multiplies all the same; the lookup of an
    embedding costs nothing. `value_head` replaces the vocabulary head by one row.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    gated_mlp: bool
    embed_dim: int
    value_head: bool = False

    @classmethod
    def from_config(cls, hf_config: Any, value_head: bool = False) -> "ModelShape":
        """Read the shape of a `transformers` config; UserError for a type it does not know."""
        if not has_exact_count(hf_config):
            known = ", ".join(sorted(GATED_MLP))
            raise UserError(
                f"model type {hf_config.model_type!r} has no exact FLOP count; known: {known}"
            )
        layers, hidden, vocab = get_hf_configs(hf_config)
        heads = _size(hf_config, "num_attention_heads", "n_head", "num_heads")
        return cls(
            num_layers=layers,
            hidden_size=hidden,
            vocab_size=vocab,
            num_heads=heads,
            num_kv_heads=_size(hf_config, "num_key_value_heads", default=heads),
            head_dim=_size(hf_config, "head_dim", default=hidden // heads),
            intermediate_size=_size(
                hf_config, "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden
            ),
            gated_mlp=GATED_MLP[hf_config.model_type],
            embed_dim=_size(hf_config, "word_embed_proj_dim", default=hidden),
            value_head=value_head,
        )

    @property
    def layer_linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of every matrix of one layer, fused projections taken apart."""
        queries = self.num_heads * self.head_dim
        keys = self.num_kv_heads * self.head_dim
        attention = ((self.hidden_size, queries), (self.hidden_size, keys))
        attention += ((self.hidden_size, keys), (queries, self.hidden_size))
        up = ((self.hidden_size, self.intermediate_size),) * (2 if self.gated_mlp else 1)
        return (*attention, *up, (self.intermediate_size, self.hidden_size))

    @property
    def layer_params(self) -> int:
        """Parameters of the matrices of all layers, without biases and norms."""
        return self.num_layers * sum(i * o for i, o in self.layer_linears)

    @property
    def projection_params(self) -> int:
        """Parameters that join an embedding of another width to the layers, at both ends."""
        joined = self.embed_dim != self.hidden_size
        return 2 * self.embed_dim * self.hidden_size if joined else 0

    @property
    def head_params(self) -> int:
        """Parameters of the output head, tied or not."""
        return self.embed_dim * (1 if self.value_head else self.vocab_size)

    @property
    def matmul_params(self) -> int:
        """Every parameter that multiplies a token: what one decoding step reads."""
        return self.layer_params + self.projection_params + self.head_params

    def lora_params(self, lora_dim: int) -> int:
        """Parameters of adapters of this rank on every matrix of the layers."""
        return self.num_layers * sum(lora_dim * (i + o) for i, o in self.layer_linears)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a training step, apart: what the mathematics needs and what is done twice."""

    forward: float
    backward: float
    recompute: float

    @property
    def model(self) -> float:
        """Forward and backward: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """What the GPU really computes: `model` and the recomputed forward of the layers."""
        return self.model + self.recompute


def causal_pairs(length: float) -> float:
    """Return how many (query, key) pairs a causal sequence of this length attends: n(n+1)/2."""
    return length * (length + 1) / 2


def forward_flops(
    shape: ModelShape, tokens: float, pairs: float, head_tokens: float, lora_dim: int = 0
) -> float:
    """Return the FLOPs of a forward pass over `tokens`, `head_tokens` of them through the head."""
    body = shape.layer_params + shape.projection_params + shape.lora_params(lora_dim)
    return 2 * body * tokens + _attention(shape, pairs) + 2 * shape.head_params * head_tokens


def model_flops(
    shape: ModelShape,
    tokens: float,
    pairs: float,
    *,
    lora_dim: int = 0,
    base_trainable: bool | None = None,
    gradient_checkpointing: bool = False,
) -> ModelFlops:
    """Return the exact FLOPs of one training step over `tokens` that attend `pairs` positions.

    A product costs 2 FLOPs per parameter and token forward, as much for the gradient of its input
    and, if it trains, as much for its own. Frozen matrices (the base under LoRA, unless
    `base_trainable`) need the former only; a value head always trains. Attention scores and their
    mixture cost 4 · heads · head_dim per pair forward and twice that backward; sliding windows
    count as full attention. Element-wise work (norms, activations, softmax) is not counted.
    """
    base_trains = lora_dim == 0 if base_trainable is None else base_trainable
    adapters = 2 * shape.lora_params(lora_dim) * tokens
    layers = 2 * shape.layer_params * tokens
    base = layers + 2 * shape.projection_params * tokens
    head = 2 * shape.head_params * tokens
    attention = _attention(shape, pairs)
    backward = 2 * adapters + 2 * attention
    backward += base * (2 if base_trains else 1)
    backward += head * (2 if base_trains or shape.value_head else 1)
    recompute = layers + adapters + attention if gradient_checkpointing else 0.0
    return ModelFlops(base + adapters + attention + head, backward, recompute)


def generation_flops(
    shape: ModelShape, prompt_tokens: float, new_tokens: float, samples: int, lora_dim: int = 0
) -> float:
    """Return the FLOPs of sampling `new_tokens` after `prompt_tokens` in all, with a KV cache.

    Forward only: every token passes the layers once, but for the last of each answer, which
    nothing follows; the head runs once per new token. Lengths enter the attention as their mean.
    """
    tokens = prompt_tokens + new_tokens - samples
    pairs = samples * causal_pairs(tokens / samples)
    return forward_flops(shape, tokens, pairs, new_tokens, lora_dim)


def _attention(shape: ModelShape, pairs: float) -> float:
    # Query · key and weight · value: two products of head_dim, two FLOPs each, in every head.
    return 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs


def _size(config: Any, *names: str, default: int | None = None) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    if default is None:
        raise UserError(f"{type(config).__name__} has no {' or '.join(names)}: FLOPs need it")
    return default
