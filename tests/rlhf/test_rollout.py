import pytest
import torch
from transformers import LlamaForCausalLM

from dschat.errors import UserError
from dschat.models.logprobs import answer_logprobs
from dschat.models.reward_model import RewardModel, scores_at_end
from dschat.rlhf.answering import pad_rows
from dschat.rlhf.generation import SamplerLogprobs, generate
from dschat.rlhf.part_config import SamplingConfig
from dschat.rlhf.rollout import answer_values
from tests.helpers import tiny
from tests.helpers.rounding import LOGITS, LOGPROBS
from tests.helpers.tiny import EOS, PAD
from tests.rlhf.tiny_roles import MODELS, Setting, end_after, left_padded, ppo_trainer, prompts

FAMILIES = pytest.mark.parametrize("family", list(MODELS))
TOKENIZER = tiny.byte_tokenizer()
PROMPTS = [row[:-1] for row in tiny.token_rows(4, seed=3)]
ANSWERS = [row[:5] for row in tiny.token_rows(4, seed=4)]


def texts(padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same four prompts and answers behind more or less padding, (B, P + 5)."""
    width = max(len(row) for row in PROMPTS) + padding
    batch = left_padded(PROMPTS, width)
    answers = torch.tensor(ANSWERS)
    return (
        torch.cat([batch.input_ids, answers], dim=1),
        torch.cat([batch.attention_mask, torch.ones_like(answers, dtype=torch.bool)], dim=1),
    )


@FAMILIES
@torch.no_grad()
def test_more_padding_changes_no_score(family):
    model = MODELS[family]()
    torch.manual_seed(0)
    critic = RewardModel(MODELS[family](seed=1).base_model).eval()
    plain, padded = texts(0), texts(7)
    assert padded[0].shape[1] == plain[0].shape[1] + 7
    logprobs = [answer_logprobs(model, *text, 5).logprobs for text in (plain, padded)]
    torch.testing.assert_close(*logprobs, atol=LOGITS, rtol=0)
    values = [answer_values(critic, *text, 5) for text in (plain, padded)]
    torch.testing.assert_close(*values, atol=LOGITS, rtol=0)
    scores = [scores_at_end(critic(*text), text[1]) for text in (plain, padded)]
    torch.testing.assert_close(*scores, atol=LOGITS, rtol=0)


@FAMILIES
@torch.no_grad()
def test_logprobs_and_values_are_those_of_each_text_alone(family):
    """Against one unpadded pass per row over all positions, without masks or positions."""
    model = MODELS[family]()
    torch.manual_seed(0)
    critic = RewardModel(MODELS[family](seed=1).base_model).eval()
    ids, mask = texts(3)
    logprobs = answer_logprobs(model, ids, mask, 5).logprobs
    values = answer_values(critic, ids, mask, 5)
    assert logprobs.dtype == values.dtype == torch.float32
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        text = torch.tensor([prompt + answer])
        every = model(input_ids=text).logits[0].double().log_softmax(-1)
        hidden = critic.rwtransformer(input_ids=text)[0][0]
        for t, token in enumerate(answer):
            before = len(prompt) + t - 1
            assert logprobs[row, t].item() == pytest.approx(every[before, token].item(), abs=LOGITS)
            value = (hidden[before] @ critic.v_head.weight[0]).item()
            assert values[row, t].item() == pytest.approx(value, abs=LOGITS)


@FAMILIES
def test_answers_are_drawn_from_what_scoring_says(family):
    """With a cache, token by token, behind left padding: the same probabilities as in one pass."""
    model, batch, drawn_from = MODELS[family](), prompts(width=20), []
    hook = model.register_forward_hook(
        lambda module, args, output: drawn_from.append(output.logits[:, -1].float())
    )
    torch.manual_seed(1)
    sequences = generate(model, batch, SamplingConfig(8), TOKENIZER).sequences
    hook.remove()
    answers = sequences[:, 20:]
    assert torch.equal(sequences[:, :20], batch.input_ids)
    steps = torch.stack(drawn_from, dim=1).log_softmax(-1)
    expected = steps.gather(-1, answers[..., None]).squeeze(-1)
    mask = torch.cat([batch.attention_mask, torch.ones_like(answers, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        logprobs = answer_logprobs(model, sequences, mask, answers.shape[1]).logprobs
    torch.testing.assert_close(logprobs, expected, atol=LOGPROBS, rtol=0)


@pytest.fixture
def sample_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What transformers' sampling loop is called with."""
    calls = []
    original = LlamaForCausalLM._sample

    def spy(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        calls.append({"processors": list(logits_processor), "config": generation_config})
        return original(
            self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
        )

    monkeypatch.setattr(LlamaForCausalLM, "_sample", spy)
    return calls


FOLDERS_OWN = {
    "top_k": 1,
    "top_p": 0.1,
    "temperature": 0.01,
    "repetition_penalty": 9.0,
    "min_answer_seq_len": 6,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [5, 6],
    "max_length": 7,
}


def test_the_folders_generation_config_does_not_leak(sample_calls):
    model = MODELS["llama"]()
    for name, value in FOLDERS_OWN.items():
        setattr(model.generation_config, name, value)
    kept = model.generation_config
    sequences = generate(model, prompts(), SamplingConfig(4), TOKENIZER).sequences
    assert model.generation_config is kept
    assert {name: getattr(kept, name) for name in FOLDERS_OWN} == FOLDERS_OWN
    # No processor but the one that notes: the policy itself is sampled.
    assert [type(p) for p in sample_calls[0]["processors"]] == [SamplerLogprobs]
    assert sample_calls[0]["config"].do_sample
    assert sequences.shape == (4, prompts().input_ids.shape[1] + 4)


def test_sampling_settings_arrive(sample_calls):
    model = MODELS["llama"]()
    generate(model, prompts(), SamplingConfig(3, temperature=0.5, top_p=0.8, top_k=7), TOKENIZER)
    kinds = {type(p).__name__: vars(p) for p in sample_calls[0]["processors"]}
    assert kinds["TemperatureLogitsWarper"]["temperature"] == 0.5
    assert kinds["TopPLogitsWarper"]["top_p"] == 0.8
    assert kinds["TopKLogitsWarper"]["top_k"] == 7
    assert len(kinds) == 4  # and the one that notes


def test_the_generation_config_comes_back_after_a_failure(monkeypatch):
    model = MODELS["llama"]()
    kept = model.generation_config

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, prompts(), SamplingConfig(2), TOKENIZER)
    assert model.generation_config is kept


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_answer_seq_len": 0}, "max_answer_seq_len is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_sampling_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**settings)


def test_generation_stops_at_the_end_token():
    model = MODELS["llama"]()
    hook = end_after(model, [2, 1, 3, 3])
    sequences = generate(model, prompts(), SamplingConfig(8), TOKENIZER).sequences
    hook.remove()
    answers = sequences[:, prompts().input_ids.shape[1] :]
    assert answers.shape == (4, 3)  # all have ended: no token beyond the longest answer
    assert (answers == EOS).int().argmax(1).tolist() == [1, 0, 2, 2]
    assert answers[0, 2] == answers[1, 1] == answers[1, 2] == PAD


def test_experience_masks_ends_and_columns(load_roles):
    roles = load_roles(Setting())
    trainer = ppo_trainer(roles, Setting(micro_batch=3), answer=5)
    hook = end_after(roles.actor.module, [2, 1, None, 5])
    (e,) = trainer.rollout([prompts()])
    hook.remove()
    width = prompts().input_ids.shape[1]
    assert e.answers.shape == (4, 5) and e.prompt_length == width
    assert e.answer_mask.sum(-1).tolist() == [2, 1, 5, 5]
    assert torch.equal(e.answer_mask, torch.arange(5) < torch.tensor([[2], [1], [5], [5]]))
    assert e.ended.tolist() == [True, True, False, True]
    assert torch.equal(e.attention_mask[:, :width], prompts().attention_mask)
    assert torch.equal(e.attention_mask[:, width:], e.answer_mask)
    assert not e.values[~e.answer_mask].any()
    for column in (e.logprobs, e.ref_logprobs, e.values, e.model_scores):
        assert column.dtype == torch.float32 and not column.requires_grad


def test_every_role_is_in_eval_mode_for_a_rollout(load_roles):
    setting, modes = Setting(gradient_checkpointing=True), []
    roles = load_roles(setting).train()
    for engine in (roles.actor, roles.critic):
        engine.module.register_forward_hook(lambda module, *_: modes.append(module.training))
    ppo_trainer(roles, setting).rollout([prompts()])
    # Six tokens, then the actor's proof and its scoring pass; the critic's is that of its step,
    # where checkpointing counts.
    assert modes == [False] * 8 + [True]
    assert not roles.reference.training and not roles.reward.training


def test_pad_rows():
    batch = left_padded(PROMPTS[:2])
    filled = pad_rows(batch, 5)
    assert filled.real.tolist() == [True, True, False, False, False]
    assert torch.equal(filled.input_ids[2:], batch.input_ids[[0, 0, 0]])
    assert torch.equal(filled.attention_mask[2:], batch.attention_mask[[0, 0, 0]])
    assert pad_rows(batch, 2) is batch


def test_filler_rows_have_no_answer_tokens(load_roles):
    trainer = ppo_trainer(load_roles(Setting()), Setting(), per_device_generation_batch_size=4)
    batch = left_padded(PROMPTS[:1])
    (e,) = trainer.rollout([batch])
    assert len(e) == 4 and e.real.tolist() == [True, False, False, False]
    assert e.answer_mask[0].any() and not e.answer_mask[1:].any()
    # They still look at real tokens: an attention row without any would be undefined.
    assert e.attention_mask.any(-1).all() and e.logprobs.isfinite().all()
