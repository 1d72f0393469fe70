"""Log-probabilities in blocks against the model's own logits: values, gradients, what is kept."""

from collections.abc import Callable

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from dschat.models import head, head_blocks
from dschat.models.causal_lm import forward_inputs
from dschat.models.logprobs import answer_logprobs, target_logprobs, target_loss
from dschat.utils.module.lora import (
    convert_linear_layer_to_lora,
    make_model_gradient_checkpointing_compatible,
)
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers import tiny
from tests.helpers.rounding import GRADIENTS, LOGITS, NEAR_ONE
from tests.rlhf.tiny_roles import left_padded

SHAPE = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WIDE = SHAPE | {
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    **tiny.SPECIAL,
}


def of_family(family: str, **settings: object) -> PreTrainedModel:
    """A causal LM of this type with random weights, its head's bias included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        nn.init.normal_(bias)
    return model


MODELS = tiny.ARCHITECTURES | {
    "gpt_neox": lambda: of_family("gpt_neox", **WIDE),
    "head with a bias": lambda: of_family("phi", **WIDE),
    "capped logits": lambda: of_family("gemma2", **WIDE, head_dim=8, final_logit_softcapping=3.0),
    "logits over a number": lambda: of_family("granite", **WIDE, logits_scaling=5.0),
    "logits times a number": lambda: of_family("cohere", **WIDE, logit_scale=0.25),
    "no position_ids": lambda: of_family("bloom", **SHAPE, n_head=4, n_layer=2, **tiny.SPECIAL),
}
FAMILIES = pytest.mark.parametrize("family", MODELS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 5 tokens: 28 make six, the last one short."""
    monkeypatch.setattr(head_blocks, "BLOCK_BYTES", 5 * 4 * tiny.VOCABULARY)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four prompts padded on the left, answers of 7, 3, 6 and 7 tokens: (4, P + 7)."""
    prompts = left_padded([row[:-1] for row in tiny.token_rows(4, seed=3)])
    answers = torch.randint(3, 200, (4, 7), generator=torch.Generator().manual_seed(0))
    answered = torch.arange(7) < torch.tensor([7, 3, 6, 7])[:, None]
    ids = torch.cat([prompts.input_ids, answers], dim=1)
    return ids, torch.cat([prompts.attention_mask, answered], dim=1)


def plainly(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """By all logits at once: log-probabilities and entropies of the last 7 tokens."""
    logits = model(**forward_inputs(model, ids, mask)).logits[:, -8:-1].float() / temperature
    every = logits.log_softmax(-1)
    logprobs = every.gather(-1, ids[:, -7:, None]).squeeze(-1)
    return logprobs * mask[:, -7:], -(every.exp() * every).sum(-1) * mask[:, -7:]


def gradients(
    model: nn.Module, score: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What is scored, and the gradient of a weighted sum of it."""
    model.zero_grad()
    scored = score()
    (scored * torch.linspace(-1, 2, 28).view(4, 7)).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return scored.detach(), found


@FAMILIES
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_blocks_give_the_models_own_values_and_gradients(family, temperature):
    model, (ids, mask) = MODELS[family](), batch()
    expected, wanted = gradients(model, lambda: plainly(model, ids, mask, temperature)[0])
    scored, found = gradients(
        model, lambda: answer_logprobs(model, ids, mask, 7, temperature=temperature).logprobs
    )
    torch.testing.assert_close(scored, expected, atol=NEAR_ONE, rtol=NEAR_ONE)
    assert found.keys() == wanted.keys() and len(found) > 10
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=LOGITS, rtol=GRADIENTS)


@FAMILIES
def test_no_family_here_falls_back_on_its_own_logits(family, capsys):
    model, (ids, mask) = MODELS[family](), batch()
    sizes = []
    answer_logprobs(model, ids, mask, 7)  # the proof makes all logits of a few tokens
    head = model.get_output_embeddings()
    plain = head.forward
    head.forward = lambda states: sizes.append(states.shape[:-1].numel()) or plain(states)
    answer_logprobs(model, ids, mask, 7)
    assert sizes == [5, 5, 5, 5, 3] and mask[:, -7:].sum() == 23  # no prompt, no padding
    assert capsys.readouterr().out == ""


@FAMILIES
@torch.no_grad()
def test_entropy(family):
    model, (ids, mask) = MODELS[family](), batch()
    scores = answer_logprobs(model, ids, mask, 7, with_entropy=True, temperature=0.7)
    logprobs, entropy = plainly(model, ids, mask, 0.7)
    torch.testing.assert_close(scores.logprobs, logprobs, atol=NEAR_ONE, rtol=NEAR_ONE)
    torch.testing.assert_close(scores.entropy, entropy, atol=LOGITS, rtol=0)
    assert answer_logprobs(model, ids, mask, 7).entropy is None


def test_entropy_carries_no_gradient():
    model, (ids, mask) = tiny.tiny_llama(), batch()
    scores = answer_logprobs(model, ids, mask, 7, with_entropy=True)
    assert scores.logprobs.requires_grad and not scores.entropy.requires_grad


def right_padded() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four sequences, and targets of 4, 3, 5 and 4 tokens at their ends: (4, T)."""
    ids, mask = tiny.padded(tiny.token_rows(4, seed=5))
    ends, columns = mask.sum(-1, keepdim=True), torch.arange(ids.shape[1])
    return ids, mask, mask & (columns >= ends - torch.tensor([[4], [3], [5], [4]]))


def by_all_logits(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    every = model(**forward_inputs(model, ids, mask)).logits.float().log_softmax(-1)
    found = every[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return nn.functional.pad(found, (1, 0)) * targets


@FAMILIES
def test_targets_of_a_mask_have_the_models_own_values_and_gradients(family):
    model, (ids, mask, targets) = MODELS[family](), right_padded()
    weights, pairs = torch.linspace(-1, 2, ids.numel()).view(ids.shape), []
    for score in (by_all_logits, target_logprobs):
        model.zero_grad()
        scored = score(model, ids, mask, targets)
        (scored * weights).sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        pairs.append((scored.detach(), found))
    (expected, wanted), (scored, found) = pairs
    torch.testing.assert_close(scored, expected, atol=NEAR_ONE, rtol=NEAR_ONE)
    assert found.keys() == wanted.keys() and not scored[~targets].any()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=LOGITS, rtol=GRADIENTS)


def test_the_head_sees_the_targets_alone():
    model, (ids, mask, targets) = tiny.tiny_llama(), right_padded()
    target_logprobs(model, ids, mask, targets)
    sizes, plain = [], model.lm_head.forward
    model.lm_head.forward = lambda states: sizes.append(len(states)) or plain(states)
    target_logprobs(model, ids, mask, targets)
    assert sizes == [5, 5, 5, 1]  # 16 targets in blocks of 5
    sizes.clear()
    nothing = target_logprobs(model, ids, mask, torch.zeros_like(targets))
    assert sizes == [0] and not nothing.any() and nothing.requires_grad


class Shifted(nn.Module):
    """A causal LM whose logits no table knows: its own forward adds to the head's output."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.inner, self.config = model, model.config

    def get_decoder(self) -> nn.Module:
        return self.inner.get_decoder()

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids, attention_mask, position_ids, use_cache=None):
        output = self.inner(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        )
        output.logits = output.logits + torch.linspace(0, 3, tiny.VOCABULARY)
        return output


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_that_are_more_than_a_head_are_the_models_own(temperature, capsys):
    model, (ids, mask) = Shifted(tiny.tiny_llama()), batch()
    expected, wanted = gradients(model, lambda: plainly(model, ids, mask, temperature)[0])
    for turn in range(2):
        scored, found = gradients(
            model, lambda: answer_logprobs(model, ids, mask, 7, temperature=temperature).logprobs
        )
        told = capsys.readouterr().out
        assert ("Shifted: its logits are not those of an output head" in told) == (turn == 0)
        torch.testing.assert_close(scored, expected, atol=NEAR_ONE, rtol=NEAR_ONE)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=LOGITS, rtol=GRADIENTS)
    with torch.no_grad():
        entropy = answer_logprobs(model, ids, mask, 7, with_entropy=True).entropy
    torch.testing.assert_close(entropy, plainly(model, ids, mask)[1], atol=LOGITS, rtol=0)


def test_targets_of_logits_that_are_more_than_a_head():
    model, (ids, mask, targets) = Shifted(tiny.tiny_llama()), right_padded()
    with torch.no_grad():
        expected = by_all_logits(model, ids, mask, targets)
        found = target_logprobs(model, ids, mask, targets)
    torch.testing.assert_close(found, expected, atol=NEAR_ONE, rtol=NEAR_ONE)


def test_a_cap_that_small_logits_would_hide_is_found():
    """Tiny logits hardly notice a cap of 30: the proof must not believe in its absence."""
    settings = {**WIDE, "initializer_range": 1e-3, "head_dim": 8}
    model = of_family("gemma2", **settings, final_logit_softcapping=30.0).to(torch.bfloat16)
    ids, _ = batch()
    model.config.final_logit_softcapping, cap = None, 30.0
    forward = type(model).forward

    def capped(self, **inputs):
        output = forward(self, **inputs)
        output.logits = torch.tanh(output.logits / cap) * cap
        return output

    class Hidden(type(model)):
        forward = capped

    model.__class__ = Hidden
    with torch.no_grad():
        assert head._proven_split(model, ids) is None
        model.__class__ = Hidden.__base__
        assert head._proven_split(model, ids) is not None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("names", [("all-linear",), ("lm_head",)], ids=["trunk", "head"])
def test_adapters_on_trunk_and_head_get_their_gradients(checkpointing, names):
    model, (ids, mask) = tiny.adapted(tiny.tiny_llama(), lora_module_name=names), batch()
    expected, wanted = gradients(model, lambda: plainly(model, ids, mask)[0])
    if checkpointing:
        make_model_gradient_checkpointing_compatible(model)
        model.train()
    scored, found = gradients(model, lambda: answer_logprobs(model, ids, mask, 7).logprobs)
    torch.testing.assert_close(scored, expected, atol=NEAR_ONE, rtol=NEAR_ONE)
    assert found.keys() == wanted.keys() and all("lora_" in name for name in found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=LOGITS, rtol=GRADIENTS)


def test_an_adapter_put_on_the_head_later_is_seen():
    model, (ids, mask) = tiny.tiny_llama(), batch()
    with torch.no_grad():
        before = answer_logprobs(model, ids, mask, 7).logprobs
        convert_linear_layer_to_lora(model, LoraConfig(lora_dim=4, lora_module_name=("lm_head",)))
        nn.init.normal_(model.lm_head.lora_B)
        after = answer_logprobs(model, ids, mask, 7).logprobs
        torch.testing.assert_close(
            after, plainly(model, ids, mask)[0], atol=NEAR_ONE, rtol=NEAR_ONE
        )
    assert (after - before).abs().max() > 0.1


def test_bf16_logits_round_as_the_models_own():
    model, (ids, mask) = tiny.tiny_llama().to(torch.bfloat16), batch()
    with torch.no_grad():
        scores = answer_logprobs(model, ids, mask, 7)
        # A bf16 logit of size 10 is known to 2^-4; equal products round to equal logits.
        torch.testing.assert_close(scores.logprobs, plainly(model, ids, mask)[0])
    assert scores.logprobs.dtype == torch.float32


def test_the_model_is_whole_again_after_a_pass_and_after_a_failure(monkeypatch):
    model, (ids, mask) = tiny.tiny_llama(), batch()
    with torch.no_grad():
        answer_logprobs(model, ids, mask, 7)
        monkeypatch.setattr(head_blocks.HeadBlocks, "_block", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer_logprobs(model, ids, mask, 7)
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)


def test_autograd_keeps_no_logits():
    """Between the passes nothing as wide as the vocabulary is held for the answers."""
    model, (ids, mask) = tiny.tiny_llama(), batch()
    answer_logprobs(model, ids, mask, 7)
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        plainly(model, ids, mask)
        assert any(tiny.VOCABULARY in shape for shape in kept)
        kept.clear()
        answer_logprobs(model, ids, mask, 7, with_entropy=True)
    assert kept and not any(tiny.VOCABULARY in shape for shape in kept)


def wanted_of(ids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Targets at random places of right-padded rows, a first token among them."""
    wanted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    wanted[0, 0] = True  # it has nothing before it and counts as nothing
    return wanted


def loss_and_gradients(
    model: nn.Module, loss: Callable[[], torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    """A loss and a multiple of its gradient."""
    model.zero_grad()
    value = loss()
    (value * -0.3).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return value.item(), found


def plain_loss(model: nn.Module, inputs: dict, wanted: torch.Tensor) -> torch.Tensor:
    """By all logits at once."""
    every = model(**inputs).logits[:, :-1].float().log_softmax(-1)
    return -every.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)[wanted[:, 1:]].sum()


TRAINED = {
    "everything": lambda model: model,
    "frozen head": lambda model: model.get_output_embeddings().requires_grad_(False) and model,
    "adapters": lambda model: tiny.adapted(model, lora_module_name=("all-linear",)),
}


FAST = {"llama", "capped logits"}


@pytest.mark.parametrize(
    "family",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
@pytest.mark.parametrize("trained", TRAINED)
def test_the_loss_over_targets_is_the_models_own(family, trained):
    ids, mask = batch()
    ids, mask = ids.flip(1), mask.flip(1)  # padding on the right
    model = TRAINED[trained](MODELS[family]())
    inputs, wanted = forward_inputs(model, ids, mask), wanted_of(ids) & mask
    value, gradients = loss_and_gradients(model, lambda: plain_loss(model, inputs, wanted))
    found, own = loss_and_gradients(model, lambda: target_loss(model, inputs, wanted))
    # Up to 60 terms of up to 20 nats, each good to a few roundings of fp32.
    assert found == pytest.approx(value, rel=NEAR_ONE)
    assert own.keys() == gradients.keys() and own
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, atol=LOGITS, rtol=GRADIENTS)
    nothing, zeros = loss_and_gradients(
        model, lambda: target_loss(model, inputs, torch.zeros_like(wanted))
    )
    assert nothing == 0.0 and zeros and not any(gradient.any() for gradient in zeros.values())


@pytest.mark.parametrize("trained", TRAINED)
def test_the_head_makes_the_logits_of_targets_once(trained):
    model, (ids, mask) = TRAINED[trained](tiny.tiny_llama()), batch()
    inputs, wanted = forward_inputs(model, ids, mask), wanted_of(ids)
    target_loss(model, inputs, wanted)  # the proof makes the logits of a few tokens
    head, rows = model.get_output_embeddings(), []
    plain = head.forward
    head.forward = lambda states: rows.append(len(states)) or plain(states)
    target_loss(model, inputs, wanted).backward()
    assert sum(rows) == wanted[:, 1:].sum() and max(rows) == 5


def test_a_frozen_head_is_not_called_in_the_backward_pass():
    model, (ids, mask) = tiny.adapted(tiny.tiny_llama(), lora_module_name=("q_proj",)), batch()
    answer_logprobs(model, ids, mask, 7)
    head, rows = model.get_output_embeddings(), []
    plain = head.forward
    head.forward = lambda states: rows.append(len(states)) or plain(states)
    answer_logprobs(model, ids, mask, 7).logprobs.sum().backward()
    assert sum(rows) == mask[:, -7:].sum() == 23


def test_sums_of_a_head_gradient_do_not_round_from_block_to_block():
    """bf16: the head's gradient over six blocks is as good as over one."""
    model, (ids, mask) = tiny.tiny_llama().to(torch.bfloat16), batch()
    inputs, wanted = forward_inputs(model, ids, mask), wanted_of(ids)
    _, blocks = loss_and_gradients(model, lambda: target_loss(model, inputs, wanted))
    exact = model.double()
    _, gradients = loss_and_gradients(exact, lambda: plain_loss(exact, inputs, wanted))
    name = next(n for n, p in model.named_parameters() if p is model.get_output_embeddings().weight)
    difference = (blocks[name] - gradients[name]).norm() / gradients[name].norm()
    assert difference < 0.02, difference


class Engine(nn.Module):
    """A module inside DeepSpeed's engine, as far as its modes go."""

    train, eval = DeepSpeedEngine.train, DeepSpeedEngine.eval

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **inputs: torch.Tensor) -> object:
        return self.module(**inputs)


@pytest.mark.parametrize("wrap", [Engine, lambda model: model])
@pytest.mark.parametrize("is_training", [True, False])
def test_the_proof_of_the_head_draws_no_random_numbers(wrap, is_training):
    """A resumed run proves it again, amid its draws; an evaluation must not go on with dropout."""
    model, (ids, _) = tiny.tiny_llama(attention_dropout=0.5), batch()
    wrap(model).train(is_training)
    before = torch.get_rng_state()
    assert head.split_of(wrap(model), ids) is not None
    assert all(module.training == is_training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
