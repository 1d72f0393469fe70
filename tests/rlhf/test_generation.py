"""Rollout engines: where answers end, chunks of like length, several answers, fused adapters."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from dschat.data.batches import PromptBatch
from dschat.errors import UserError
from dschat.models.logprobs import answer_logprobs
from dschat.rlhf.answering import start_sorted
from dschat.rlhf.generation import Sampled, StopStrings, answer_ends, tell_unused_ends
from dschat.rlhf.part_config import SamplingConfig
from dschat.rlhf.rollout_engine import TransformersRollout
from dschat.utils.module.lora import lora_layers
from dschat.utils.module.lora_config import LoraConfig
from tests.helpers import tiny
from tests.helpers.rounding import LOGITS, LOGPROBS, NEAR_ONE
from tests.helpers.tiny import EOS, PAD
from tests.rlhf.tiny_roles import (
    LORA,
    Setting,
    end_after,
    left_padded,
    ppo_trainer,
    prompts,
    weights,
)

TOKENIZER = tiny.byte_tokenizer()  # one token a byte


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def rows(*texts: str) -> torch.Tensor:
    """Answers as an engine returns them: `$` is the end token, short ones are padded."""
    parts = [[EOS if c == "$" else ids_of(c)[0] for c in text] for text in texts]
    width = max(len(part) for part in parts)
    return torch.tensor([part + [PAD] * (width - len(part)) for part in parts])


# --- where an answer ends --------------------------------------------------------------------


def test_an_answer_ends_with_its_end_token_or_a_stop_string():
    answers = rows("abc$", "ab\n\nx", "abcdefg", "a$\n\n", "\n\n", "ab\n\n$", "a\nb\nc")
    mask, ended = answer_ends(answers, TOKENIZER, ("\n\n", "ef"))
    assert mask.sum(-1).tolist() == [4, 4, 6, 2, 2, 4, 7]  # the padded last row never ends
    assert ended.tolist() == [True, True, True, True, True, True, False]
    plain, plainly = answer_ends(answers, TOKENIZER)
    assert plain.sum(-1).tolist() == [4, 7, 7, 2, 7, 5, 7]
    assert plainly.tolist() == [True, False, False, True, False, True, False]


def test_a_stop_string_longer_than_its_token_count_allows_is_seen():
    """The tail that is looked at holds the whole string, however long."""
    text = "end of answer " * 5
    mask, ended = answer_ends(rows("x" * 40 + text + "tail"), TOKENIZER, (text,))
    assert mask.sum().item() == 40 + len(text) and ended.all()


def test_a_character_of_several_tokens_stops():
    answer = ids_of("ab€cd")
    assert len(answer) == 7
    mask, ended = answer_ends(torch.tensor([answer]), TOKENIZER, ("€",))
    assert mask.sum().item() == 5 and ended.all()


class WideTokens:
    """A tokenizer some of whose tokens hold more than a stop string does."""

    TEXTS = ("<pad>", "<s>", "</s>", "a", "b\n\nUser", ":", "\n", "\nb")

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(self.TEXTS[i] for i in ids)


@pytest.mark.parametrize(
    "answer, end", [([3, 4, 5], 2), ([3, 6, 7, 3], 3), ([6, 3, 6, 3], None), ([6, 6], 2)]
)
def test_a_token_that_holds_more_than_the_stop_string_counts_whole(answer, end):
    assert StopStrings(("\n\n",), WideTokens()).end(answer) == end


def say(model: nn.Module, *texts: str) -> Callable[[], None]:
    """Make row i of one generation say its text, token by token, then go on with `z`."""
    steps = []

    def force(_, args, kwargs, output):
        if kwargs["use_cache"]:
            for row, text in enumerate(texts):
                said = EOS if (text + "zzzzzzzz")[len(steps)] == "$" else None
                token = ids_of((text + "zzzzzzzz")[len(steps)])[0] if said is None else said
                output.logits[row, -1] = -1e4
                output.logits[row, -1, token] = 1e4
            steps.append(None)
        return output

    return model.register_forward_hook(force, with_kwargs=True).remove


def test_generation_stops_at_a_stop_string():
    model = tiny.tiny_llama()
    engine = TransformersRollout(model, tiny.byte_tokenizer())
    stop = say(model, "ab\n\ncd", "a$", "\n\n", "abc")
    sequences = engine.generate(prompts(), SamplingConfig(8, stop_strings=("\n\n", "cz"))).sequences
    stop()
    answers = sequences[:, prompts().input_ids.shape[1] :]
    assert torch.equal(answers, rows("ab\n\n", "a$", "\n\n", "abcz"))  # the longest ends it all


def test_prompts_that_hold_a_stop_string_do_not_end_their_answers():
    model, (text, *_) = tiny.tiny_llama(), [ids_of("x\n\n")]
    engine = TransformersRollout(model, tiny.byte_tokenizer())
    stop = say(model, "abc")
    sequences = engine.generate(
        left_padded([text]), SamplingConfig(4, stop_strings=("\n\n",))
    ).sequences
    stop()
    assert torch.equal(sequences[:, 3:], rows("abcz"))


def test_an_experience_ends_where_a_stop_string_does(load_roles):
    roles = load_roles(Setting())
    trainer = ppo_trainer(roles, Setting())
    trainer.config = replace(trainer.config, sampling=SamplingConfig(8, stop_strings=("\n\n",)))
    stop = say(roles.actor.module, "a\n\n", "\n\n", "ab$", "\n")
    (e,) = trainer.rollout([prompts()])
    stop()
    assert e.answer_mask.sum(-1).tolist() == [3, 2, 3, 8]
    assert e.ended.tolist() == [True, True, True, False]
    width = e.prompt_length
    assert torch.equal(e.attention_mask[:, width:], e.answer_mask)


def test_no_end_token_before_the_least_length():
    model = tiny.tiny_llama()
    engine = TransformersRollout(model, tiny.byte_tokenizer())
    hook = end_after(model, [1, 2, 3, 4])
    torch.manual_seed(0)
    sequences = engine.generate(prompts(), SamplingConfig(6, min_answer_seq_len=3)).sequences
    hook.remove()
    mask, ended = answer_ends(sequences[:, prompts().input_ids.shape[1] :], TOKENIZER)
    # Rows 0 and 1 wanted to end too early and never do; the others end where they wish.
    assert ended.tolist() == [False, False, False, True] and mask.sum(-1).tolist() == [6, 6, 6, 4]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_engine_tells_the_log_probabilities_that_it_sampled_by(load_roles, temperature):
    """With a cache, padding and early ends: those of a scoring pass, to rounding."""
    roles = load_roles(Setting(dtype="fp32"))
    trainer = ppo_trainer(roles, Setting())
    sampling = SamplingConfig(6, temperature=temperature)
    trainer.config = replace(trainer.config, sampling=sampling)
    hook = end_after(roles.actor.module, [2, 6, 1, None])
    (e,) = trainer.rollout([prompts()])
    hook.remove()
    assert e.sampler_logprobs.shape == e.logprobs.shape == e.answer_mask.shape
    (plain,) = trainer.rollout([prompts(seed=1)])  # nobody pushes its ends
    gap = (plain.sampler_logprobs - plain.logprobs).abs()[plain.answer_mask]
    assert gap.max() < LOGITS
    assert trainer.earned([plain])["decode_gap_max"] == gap.max().item()
    other = replace(sampling, temperature=2.0)  # drawn by one, scored by another
    engine = TransformersRollout(roles.actor, roles.tokenizer)
    trainer.engine = Fixed(engine.generate(prompts(), other))
    assert trainer.earned(trainer.rollout([prompts()]))["decode_gap"] > 0.05


@dataclass(frozen=True)
class Fixed:
    """An engine that says the same every time."""

    refills = False

    sampled: Sampled

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig) -> Sampled:
        return self.sampled

    def weights_changed(self) -> None:
        pass


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"min_answer_seq_len": -1}, "min_answer_seq_len is -1: give 0 or more"),
        (
            {"max_answer_seq_len": 3, "min_answer_seq_len": 4},
            "min_answer_seq_len is 4: .* which is 3",
        ),
        ({"stop_strings": ("a", "")}, "stop_strings holds an empty text"),
    ],
)
def test_ends_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**settings)


def test_other_end_tokens_neither_stop_nor_pass_unnoticed(tmp_path, capsys):
    folder = tiny.save_llama_folder(tmp_path / "model")
    tokenizer = tiny.byte_tokenizer()
    GenerationConfig(eos_token_id=[EOS, 45, 46], pad_token_id=PAD).save_pretrained(folder)
    tell_unused_ends(str(folder), tokenizer)
    lines = capsys.readouterr().out.splitlines()
    names = tokenizer.convert_ids_to_tokens([45, 46])
    assert len(lines) == 2
    for name, line in zip(names, lines, strict=True):
        assert f"stop_strings '{name}' lets it end" in line
    model = tiny.tiny_llama()
    model.generation_config.eos_token_id = [EOS, 45]
    hook = end_after(model, [2])
    hook.remove()
    stop = say(model, tokenizer.decode([45]) * 2 + "$")
    engine = TransformersRollout(model, tokenizer)
    sequences = engine.generate(left_padded([[5, 6]]), SamplingConfig(5)).sequences
    stop()
    assert sequences[0, 2:].tolist() == [45, 45, EOS]
    GenerationConfig(eos_token_id=EOS).save_pretrained(folder)
    tell_unused_ends(str(folder), tokenizer)
    (folder / "generation_config.json").unlink()
    tell_unused_ends(str(folder), tokenizer)
    assert capsys.readouterr().out == ""


def test_greedy_takes_the_likeliest_token():
    model = tiny.tiny_llama()
    engine = TransformersRollout(model, tiny.byte_tokenizer())
    first = engine.next_logits(prompts()).argmax(-1)
    sequences = engine.generate(prompts(), SamplingConfig(3, greedy=True)).sequences
    assert torch.equal(sequences[:, prompts().input_ids.shape[1]], first)
    assert torch.equal(
        engine.generate(prompts(), SamplingConfig(3, greedy=True)).sequences, sequences
    )


# --- chunks and several answers --------------------------------------------------------------


@dataclass
class Echo:
    """An engine whose answer is its prompt's last tokens, as many as the prompt is long, less 4.

    The k-th answer to one prompt ends in k.
    """

    refills = False

    seen: list[PromptBatch] = field(default_factory=list)
    counts: dict = field(default_factory=dict)

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig) -> Sampled:
        self.seen.append(prompts)
        answers = []
        for ids, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True):
            prompt = tuple(ids[mask].tolist())
            k = self.counts[prompt] = self.counts.get(prompt, 0) + 1
            answers.append([*prompt[4:], 200 + k, EOS])
        return Sampled(torch.cat([prompts.input_ids, tiny.padded(answers)[0]], dim=1))

    def weights_changed(self) -> None:
        pass


PROMPTS = [row[:-1] for row in tiny.token_rows(8, seed=11)]
LENGTHS = [len(row) for row in PROMPTS]


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_chunks_hold_prompts_of_like_length_and_rows_come_home(chunk):
    engine, batch = Echo(), left_padded(PROMPTS, 20)
    made = start_sorted(engine, batch, SamplingConfig(16), chunk, PAD)()
    for prompt, answer in zip(PROMPTS, made.answers, strict=True):
        expected = [*prompt[4:], 201, EOS]
        assert answer.tolist() == expected + [PAD] * (made.answers.shape[1] - len(expected))
    assert made.answers.shape[1] == max(LENGTHS) - 2
    widths = [batch.input_ids.shape[1] for batch in engine.seen]
    in_order = sorted(LENGTHS) if chunk < 8 else LENGTHS
    assert widths == [max(in_order[i : i + chunk]) for i in range(0, 8, chunk)]
    assert made.steps == sum(width - 2 for width in widths)
    for seen in engine.seen:
        assert not seen.input_ids[~seen.attention_mask].any()  # PAD is 0


@pytest.mark.parametrize("chunk", [0, 1, 3, 5, 100])
def test_an_experience_does_not_depend_on_the_chunks(load_roles, chunk):
    """Two batches of different widths, the second one short, three answers a prompt."""
    roles, echo = load_roles(Setting()), Echo()
    trainer = ppo_trainer(roles, Setting(), answers_per_prompt=3, generation_chunk_size=chunk)
    trainer.engine = echo
    first, second = left_padded(PROMPTS[:4]), left_padded(PROMPTS[4:7], 15)
    experiences = trainer.rollout([first, second])
    assert [len(e) for e in experiences] == [12, 12]
    assert {tuple(b.real.shape) for b in echo.seen[:-1]} <= {(chunk or 12,)}
    rows = [
        (e.sequences[i][e.attention_mask[i]].tolist(), *(x[i] for x in (e.real, e.group, e.ended)))
        for e in experiences
        for i in range(12)
    ]
    real = [True] * 21 + [False] * 3
    for row, (ids, is_real, group, ended) in enumerate(rows):
        prompt = [*PROMPTS[:7], PROMPTS[4]][row // 3]
        # The filler prompt repeats the second batch's first: its answers are the 4th to 6th.
        assert ids[: len(prompt)] == prompt and ids[-1] == EOS and ended
        assert ids[len(prompt) : -2] == prompt[4:]
        assert is_real == real[row] and group == row // 3
    assert experiences[1].prompt_length == 15
    for e in experiences:
        assert e.answer_mask.shape[1] == e.answer_mask.sum(-1).max()
        for i in range(12):
            text = e.sequences[i : i + 1][:, e.attention_mask[i]]
            length = int(e.attention_mask[i, e.prompt_length :].sum())
            seen = torch.ones_like(text, dtype=torch.bool)
            with torch.no_grad():
                alone = answer_logprobs(roles.actor, text, seen, length).logprobs[0]
            torch.testing.assert_close(e.logprobs[i, :length], alone, atol=LOGITS, rtol=0)
            assert not e.logprobs[i, length:].any() and not e.values[i, length:].any()
    assert experiences[0].generation_seconds > 0
    assert experiences[0].generation_steps > 0 == experiences[1].generation_steps


@pytest.mark.parametrize("answers", [1, 3])
def test_an_evaluation_takes_its_own_number_of_answers_to_a_prompt(load_roles, answers: int):
    """One by default; more in rounds of one, in which answers to a prompt go together."""
    changes = {"eval_answers_per_prompt": 3} if answers > 1 else {}
    trainer = ppo_trainer(load_roles(Setting()), Setting(), answers_per_prompt=3, **changes)
    trainer.engine = Echo()
    batches = [left_padded(PROMPTS[:4]), left_padded(PROMPTS[4:7])]
    statistics, rollouts = trainer.evaluated(batches)
    assert [len(batch.real) for batch in trainer.engine.seen] == [4] * 2 * answers
    lengths = [n - 2 for n in LENGTHS[:7]]
    assert statistics["answer_length"] == pytest.approx(sum(lengths) / 7)
    groups = torch.cat([e.group[e.real] for e in rollouts])
    assert groups.tolist() == [*range(7)] * answers and statistics["answers"] == 7 * answers
    # The error is by what the seven prompts differ in, however often each is answered.
    error = torch.tensor(lengths, dtype=torch.float64).std().item() / 7**0.5
    assert statistics["answer_length_error"] == pytest.approx(error)


def test_without_a_critic_there_are_no_values(load_roles):
    trainer = ppo_trainer(load_roles(Setting(), critic=None), Setting())
    (e,) = trainer.rollout([prompts()])
    assert e.values is None and e.rows(torch.tensor([1, 0])).values is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"answers_per_prompt": 0}, "answers_per_prompt is 0: give at least 1"),
        ({"generation_chunk_size": -1}, "generation_chunk_size is -1: give 0 or more"),
    ],
)
def test_numbers_of_answers_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        ppo_trainer(None, Setting(), **changes)


def test_the_temperature_of_sampling_is_that_of_scoring(load_roles):
    """Sampled at 0.5 and scored at 0.5: ratio 1, and the likelier text of the colder policy."""
    roles = load_roles(Setting())
    trainer = ppo_trainer(roles, Setting())
    (at_one,) = trainer.rollout([prompts()])
    sampling = SamplingConfig(6, temperature=0.5)
    trainer.config = replace(trainer.config, sampling=sampling)
    drawn = []
    hook = roles.actor.module.register_forward_hook(
        lambda _, args, kwargs, output: (
            drawn.append(output.logits[:, -1].float()) if kwargs["use_cache"] else None
        ),
        with_kwargs=True,
    )
    torch.manual_seed(0)
    (e,) = trainer.rollout([prompts()])
    hook.remove()
    cold = (torch.stack(drawn, dim=1) / 0.5).log_softmax(-1)
    expected = cold.gather(-1, e.answers[..., None]).squeeze(-1)
    torch.testing.assert_close(
        e.logprobs[e.answer_mask], expected[e.answer_mask], atol=LOGPROBS, rtol=0
    )
    # Actor and reference are one policy still: both at the same temperature.
    torch.testing.assert_close(e.logprobs, e.ref_logprobs, atol=NEAR_ONE, rtol=0)
    statistics = trainer.train_rlhf([e])
    assert statistics["ratio"] == pytest.approx(1.0, abs=NEAR_ONE)
    assert statistics["kl"] == pytest.approx(0.0, abs=LOGITS)
    assert statistics["entropy"] < 0.9 * trainer_entropy(roles, at_one)


def trainer_entropy(roles, e) -> float:
    """Mean entropy of the policy at temperature 1 over an experience's tokens."""
    with torch.no_grad():
        entropy = answer_logprobs(
            roles.actor, e.sequences, e.attention_mask, e.answer_mask.shape[1], with_entropy=True
        ).entropy
    return entropy[e.answer_mask].mean().item()


# --- fused adapters --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora", [LORA, LoraConfig(lora_dim=4, lora_alpha=8.0, use_dora=True)], ids=["lora", "dora"]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fused_generation_leaves_the_base_bit_for_bit_and_the_ratio_one(
    load_roles, lora, dtype, family
):
    setting = Setting(lora=lora, dtype=dtype)
    roles = load_roles(setting, family)
    for layer in lora_layers(roles.actor.module).values():
        nn.init.normal_(layer.lora_B, std=0.05)
    plain = TransformersRollout(roles.actor, roles.tokenizer)
    engine = TransformersRollout(roles.actor, roles.tokenizer, fuse_adapters=True)
    trainer = ppo_trainer(roles, setting)
    trainer.engine, before = engine, weights(roles.actor.module)
    unfused, fused = plain.next_logits(prompts()), engine.next_logits(prompts())
    assert not torch.equal(unfused, fused)  # rounding tells that something was folded in
    if dtype == "fp32":
        torch.testing.assert_close(fused, unfused, atol=LOGITS, rtol=0)
    (e,) = trainer.rollout([prompts()])
    after = weights(roles.actor.module)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    statistics = trainer.train_rlhf([e])
    assert statistics["ratio"] == pytest.approx(1.0, abs=NEAR_ONE)
    assert statistics["clip_fraction"] == 0.0
