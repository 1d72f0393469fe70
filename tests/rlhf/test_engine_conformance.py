"""What every rollout engine must do, each against passes over entire texts without a cache."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn

from dschat.data.batches import PromptBatch
from dschat.models.logprobs import answer_logprobs
from dschat.rlhf.generation import SamplingConfig
from dschat.rlhf.rollout_engine import RolloutEngine, TransformersRollout
from dschat.rlhf.static_model import StaticModel
from dschat.rlhf.static_rollout import StaticRollout
from dschat.utils.module.lora import adapters_disabled, lora_layers
from tests.helpers import tiny
from tests.helpers.rounding import LOGITS, LOGPROBS
from tests.helpers.tiers import tiers
from tests.helpers.vllm_stub import Stub, served, vllm_rollout, without_adapters
from tests.rlhf.tiny_roles import LORA, MODELS, Setting, ppo_trainer, prompts

TOKENIZER = tiny.byte_tokenizer()
ENGINES: dict[str, Callable[[nn.Module], RolloutEngine]] = {
    "generate": lambda model: TransformersRollout(model, TOKENIZER),
    "generate, fused": lambda model: TransformersRollout(model, TOKENIZER, fuse_adapters=True),
    "static": lambda model: StaticRollout(StaticModel(model), TOKENIZER, 3),  # one prompt waits
    "static, fused": lambda model: StaticRollout(StaticModel(model), TOKENIZER, 8, True),
    "static, unrecorded": lambda model: StaticRollout(StaticModel(model, False), TOKENIZER, 3),
    "vllm": lambda model: vllm_rollout(
        model,
        SERVERS.enter_context(served(Stub(without_adapters(model), TOKENIZER))),
        Path(SERVERS.enter_context(TemporaryDirectory())),
    ),
}
SERVERS = ExitStack()  # of one test
ANSWER = 7
each_engine = pytest.mark.parametrize("name", ENGINES)
core_engine = pytest.mark.parametrize("name", tiers(ENGINES, ("generate", "static, fused", "vllm")))


@pytest.fixture(autouse=True)
def servers_end() -> Iterator[None]:
    yield
    SERVERS.close()


@torch.no_grad()
def prove(engine: RolloutEngine, model: nn.Module, batch: PromptBatch, seed: int = 3) -> None:
    """Stop unless greedy answers, log-probabilities and first logits are the model's own."""
    width = batch.input_ids.shape[1]
    whole = SamplingConfig(ANSWER, min_answer_seq_len=ANSWER, greedy=True)
    sequences = engine.generate(batch, whole).sequences
    assert torch.equal(sequences[:, :width], batch.input_ids)
    mask = torch.nn.functional.pad(batch.attention_mask, (0, ANSWER), value=True)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask.long(), "position_ids": positions}
    logits = model(sequences, **inputs, use_cache=False).logits[:, width - 1 : -1]
    logits[..., tiny.EOS] = -torch.inf  # as the least length has it
    assert torch.equal(sequences[:, width:], logits.argmax(-1))

    torch.manual_seed(seed)
    sampled = engine.generate(batch, SamplingConfig(ANSWER, temperature=0.7))
    answers = sampled.sequences[:, width:]
    ended = (answers == tiny.EOS).long().cumsum(-1) - (answers == tiny.EOS).long() > 0
    seen = torch.cat([batch.attention_mask, ~ended], dim=1)
    length = answers.shape[1]
    expected = answer_logprobs(model, sampled.sequences, seen, length, temperature=0.7).logprobs
    assert sampled.logprobs is not None and sampled.logprobs.dtype == torch.float32
    torch.testing.assert_close(sampled.logprobs[~ended], expected[~ended], atol=LOGPROBS, rtol=0)

    first = model(
        batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        position_ids=positions[:, :width],
    ).logits[:, -1]
    told = engine.next_logits(batch)
    if told is not None:
        torch.testing.assert_close(told, first, atol=LOGITS, rtol=0)


def answers_of(engine: RolloutEngine, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return engine.generate(prompts(), SamplingConfig(ANSWER)).sequences


@torch.no_grad()
def train_a_little(model: nn.Module) -> None:
    """Change every trainable weight in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@each_engine
@pytest.mark.parametrize("family", tiers(MODELS, ("llama",)))
def test_an_engine_samples_the_model(name, family):
    model = MODELS[family]()
    engine = ENGINES[name](model)
    prove(engine, model, prompts())
    prove(engine, model, prompts(seed=1, width=17))  # another shape, more padding


@core_engine
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_an_engine_follows_the_weights(name, lora):
    """After an update, after other weights were loaded, with adapters off, and back again."""
    if name == "vllm" and not lora:
        pytest.skip("a run with this engine and no adapters is refused")
    model = tiny.adapted(tiny.tiny_llama()) if lora else tiny.tiny_llama()
    engine = ENGINES[name](model)
    loaded = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prove(engine, model, prompts())
    before = answers_of(engine)
    train_a_little(model)
    engine.weights_changed()
    prove(engine, model, prompts())
    model.load_state_dict(loaded)  # as a resumed run does
    engine.weights_changed()
    prove(engine, model, prompts())
    if lora:
        with adapters_disabled(model):
            engine.weights_changed()
            prove(engine, model, prompts())
            assert not torch.equal(answers_of(engine), before)
        engine.weights_changed()
        prove(engine, model, prompts())
    assert torch.equal(answers_of(engine), before)


@core_engine
def test_answers_depend_on_the_seed_and_the_weights_alone(name):
    """An engine that has worked, and one that a resumed run has made, draw the same answers."""
    model = tiny.tiny_llama()
    used = ENGINES[name](model)
    answers_of(used, seed=5)
    assert torch.equal(answers_of(used), answers_of(ENGINES[name](model)))
    assert not torch.equal(answers_of(used), answers_of(used, seed=1))


def test_the_trainer_tells_its_engine_when_weights_change(load_roles):
    roles, told = load_roles(Setting(lora=LORA)), []
    trainer = ppo_trainer(roles, Setting())
    trainer.engine = TransformersRollout(roles.actor, roles.tokenizer)
    object.__setattr__(trainer.engine, "weights_changed", lambda: told.append(weights(roles)))
    before, experiences = weights(roles), trainer.rollout([prompts()])
    assert told == []
    trainer.train_rlhf(experiences)
    assert len(told) == 1 and not torch.equal(told[0], before)
    trainer.load_state_dict(trainer.state_dict())
    assert len(told) == 2


def weights(roles) -> torch.Tensor:
    layers = lora_layers(roles.actor.module).values()
    return torch.cat([layer.lora_B.detach().flatten().clone() for layer in layers])
