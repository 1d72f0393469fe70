"""The static engine: refilled rows, shared prompts, what it draws, and which models it serves."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dschat.data.batches import PromptBatch
from dschat.rlhf import static_cache, static_rollout
from dschat.rlhf.answering import repeated
from dschat.rlhf.drawing import Drawing
from dschat.rlhf.generation import SamplingConfig, answer_ends
from dschat.rlhf.rollout_engine import TransformersRollout
from dschat.rlhf.static_cache import BLOCK
from dschat.rlhf.static_model import StaticModel
from dschat.rlhf.static_proof import disproof
from dschat.rlhf.static_rollout import StaticRollout
from dschat.utils.module.lora import fused_bytes
from tests.helpers import tiny
from tests.helpers.rounding import LOGITS, NEAR_ONE
from tests.helpers.tiers import tiers
from tests.rlhf.test_engine_conformance import prove
from tests.rlhf.tiny_roles import MODELS, Setting, ppo_trainer, prompts

TOKENIZER = tiny.byte_tokenizer()
LONGEST = 40


def of(name: str, **changes: object) -> nn.Module:
    """A lively model of a family that is made here alone."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**tiny.SHAPE, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def answers(engine, batch: PromptBatch, sampling: SamplingConfig) -> list[list[int]]:
    """Each answer up to its end."""
    made = engine.generate(batch, sampling).sequences[:, batch.input_ids.shape[1] :]
    mask, _ = answer_ends(made, engine.tokenizer, sampling.stop_strings)
    return [row[kept].tolist() for row, kept in zip(made, mask, strict=True)]


@pytest.mark.parametrize("by_text", [False, True], ids=["end token", "stop string"])
def test_rows_are_refilled_and_answers_stay_those_of_generate(monkeypatch, by_text):
    model, batch, tokenizer = tiny.tiny_llama(), prompts(12), tiny.byte_tokenizer()
    whole = answers(TransformersRollout(model, tokenizer), batch, SamplingConfig(20, greedy=True))
    often = torch.tensor(whole).flatten().bincount().topk(3).indices.tolist()
    stops = tuple(tokenizer.decode(i) for i in often[1:]) if by_text else ()
    if not by_text:  # what the model says most often ends an answer: lengths differ
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(often[0])
    sampling = SamplingConfig(20, greedy=True, stop_strings=stops)
    expected = answers(TransformersRollout(model, tokenizer), batch, sampling)
    engine = StaticRollout(StaticModel(model), tokenizer, rows=4)
    assert answers(engine, batch, sampling) == expected
    lengths = [len(answer) for answer in expected]
    assert len({*lengths}) > 3
    # Three chunks of four rows would each take as long as their longest answer, whose first token
    # comes with the prompt's pass.
    decoded, step = [], StaticModel.step
    monkeypatch.setattr(StaticModel, "step", lambda *args: decoded.append(0) or step(*args))
    engine.generate(batch, sampling)
    assert len(decoded) < sum(max(lengths[i : i + 4]) - 1 for i in range(0, 12, 4))


@pytest.mark.parametrize("late", [1, 8], ids=["CPU", "device"])
def test_long_and_short_answers_share_a_cache_that_is_full(monkeypatch, late):
    """One that ends at the cache's last column leaves a slot inside it."""
    monkeypatch.setattr(static_rollout, "LATE", late)
    monkeypatch.setattr(static_rollout, "_asks_at_once", lambda device: late == 1)
    monkeypatch.setattr(static_cache, "BLOCK", 4)
    model, batch, tokenizer = tiny.tiny_gpt2(), prompts(9), tiny.byte_tokenizer()
    sampling = SamplingConfig(20, greedy=True)
    whole = answers(TransformersRollout(model, tokenizer), batch, sampling)
    # An end for which the row that is ahead ends where the cache is full, while others go on.
    often = torch.tensor([i for answer in whole for i in answer]).bincount().topk(3).indices[2]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(often.item())
    expected = answers(TransformersRollout(model, tokenizer), batch, sampling)
    assert len({len(answer) for answer in expected}) > 2
    assert answers(StaticRollout(StaticModel(model), tokenizer, 4), batch, sampling) == expected


def test_copies_of_a_prompt_are_computed_once_and_drawn_apart(monkeypatch):
    engine = StaticRollout(StaticModel(tiny.tiny_llama()), TOKENIZER, rows=12)
    seen, prefill = [], StaticModel.prefill

    def spy(self, cache, ids, *others):
        seen.append(ids)
        return prefill(self, cache, ids, *others)

    monkeypatch.setattr(StaticModel, "prefill", spy)
    batch = repeated(prompts(), 3)
    torch.manual_seed(0)
    made = engine.generate(batch, SamplingConfig(6)).sequences
    assert [len(ids) for ids in seen] == [4]
    assert len(made.unique(dim=0)) == 12
    prove(engine, engine.static.model, batch)


def test_a_token_is_drawn_as_often_as_it_is_likely():
    count, logits = 40_000, torch.tensor([2.0, 1.0, 0.0, -1.0, -8.0])
    torch.manual_seed(0)
    lengths = torch.zeros(count, dtype=torch.long)
    tokens, logprobs = Drawing(SamplingConfig(temperature=2.0), 4)(
        logits.expand(count, -1), lengths
    )
    p = (logits / 2).softmax(-1)
    share = tokens.bincount(minlength=5) / count
    # Five standard deviations of a share: sqrt(p (1 - p) / n).
    assert ((share - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()
    torch.testing.assert_close(logprobs, p.log()[tokens])


@pytest.mark.parametrize(
    "settings, allowed",
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0}),  # 0.63 of the distribution
        ({"min_answer_seq_len": 1}, {1, 2, 3}),  # the end token is 0
        ({"greedy": True}, {0}),
    ],
)
def test_filters_cut_tokens_off_and_log_probabilities_stay_of_the_policy(settings, allowed):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(500, -1)
    tokens, logprobs = Drawing(SamplingConfig(**settings), 0)(
        logits, torch.zeros(500, dtype=torch.long)
    )
    assert {*tokens.tolist()} == allowed
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[0][tokens])


FAMILIES = {
    **MODELS,
    "mistral": lambda: of("mistral", sliding_window=5),
    "qwen2": lambda: of("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "gemma3": lambda: of("gemma3_text", sliding_window=5, head_dim=8, num_hidden_layers=6),
    "qwen3": lambda: of("qwen3", head_dim=8),
    "phi3": lambda: of("phi3", pad_token_id=0),
    "mixtral": lambda: tiny.tiny_moe("mixtral"),
}


@pytest.mark.parametrize("name", tiers(FAMILIES, ("mistral",)))
def test_families_that_pass_the_proof_pass_the_conformance_test(name):
    static = StaticModel(FAMILIES[name]())
    assert disproof(static, LONGEST) is None and static.records
    prove(StaticRollout(static, TOKENIZER, 3), static.model, prompts(width=15))


@pytest.mark.parametrize(
    "model, reason",
    [
        (lambda: of("bloom", n_layer=2, n_head=4), "it takes no position_ids"),
        (lambda: of("gemma2", head_dim=8, sliding_window=5), "softcap"),
    ],
)
def test_models_that_it_does_not_serve_are_named(model, reason):
    assert reason in (disproof(StaticModel(model()), LONGEST) or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_position_or_mask_is_no_rounding(monkeypatch, dtype):
    static = StaticModel(tiny.tiny_llama().to(dtype))
    assert disproof(static, LONGEST) is None
    step = StaticModel.step

    def shifted(self, cache, tokens, columns, first, width):
        return step(self, cache, tokens, columns, first - 1, width)

    monkeypatch.setattr(StaticModel, "step", shifted)
    assert "its logits differ by" in (disproof(static, LONGEST) or "")


def test_a_step_that_cannot_be_recorded_is_left_to_python(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no tracing here")

    monkeypatch.setattr(torch.jit, "trace", fail)
    static = StaticModel(tiny.tiny_llama())
    assert disproof(static, LONGEST) is None and not static.records


def test_a_step_that_depends_on_values_is_not_recorded():
    model = tiny.tiny_llama()

    def looks(module, inputs, output):
        return output + 0 if output.sum() > 0 else output  # one of the two would be recorded

    model.model.norm.register_forward_hook(looks)
    static = StaticModel(model)
    assert disproof(static, LONGEST) is None and not static.records
    prove(StaticRollout(static, TOKENIZER, 3), model, prompts())


def test_the_cache_grows_in_blocks_and_no_further_than_answers_reach():
    static, batch = StaticModel(tiny.tiny_llama(max_position_embeddings=256)), prompts(width=15)
    cache, rows = static.cache(4), torch.arange(4)
    static.prefill(cache, batch.input_ids, batch.attention_mask, rows, rows)
    assert cache.columns == 15
    cache.reserve(16, 200)
    assert cache.columns == BLOCK
    held = cache.tensors[0]
    cache.reserve(BLOCK, 200)
    assert cache.tensors[0] is held  # nothing is copied until a block is full
    cache.reserve(BLOCK + 1, 100)
    assert cache.columns == 100
    # Two layers of keys and values, 2 heads of 8, fp32: as a dynamic cache of so many columns.
    assert sum(x.nbytes for x in cache.tensors) == 4 * 2 * 2 * 2 * 8 * 4 * 100


def test_ppo_on_the_static_engine(load_roles):
    """Ratio 1 on fresh answers, a gap of rounding alone, and the bytes that folding takes."""
    roles = load_roles(Setting(lora=replace(Setting().lora, lora_dim=4)))
    trainer = ppo_trainer(roles, Setting(micro_batch=8), answers_per_prompt=2)
    trainer.engine = StaticRollout(StaticModel(roles.actor.module), roles.tokenizer, 3, True)
    for seed in (0, 1):
        statistics = trainer.train_rlhf(trainer.rollout([prompts(seed=seed)]))
        assert statistics["ratio"] == pytest.approx(1.0, abs=NEAR_ONE)
        assert statistics["decode_gap"] < LOGITS
    # 2 layers of q, o (32 x 32), k, v (16 x 32), gate, up, down (48 x 32), fp32
    assert fused_bytes(roles.actor.module) == 2 * 4 * 32 * (2 * 32 + 2 * 16 + 3 * 48)
