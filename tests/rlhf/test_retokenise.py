"""A reward model that reads other tokens than the actor writes: the scores of the text itself."""

from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dschat.data.collators import PairCollator
from dschat.data.tokenise import Converter
from dschat.errors import UserError
from dschat.models.reward_model import RewardModel, create_critic_model
from dschat.models.save import save_hf_format
from dschat.rlhf.retokenise import Retokeniser
from dschat.text.conversations import Example, Turn
from dschat.text.formats import choose_format
from dschat.train.evaluation import pair_scores
from tests.helpers.adapters import ALONE
from tests.helpers.rounding import NEAR_ONE
from tests.helpers.tiny import EOS, byte_tokenizer, tiny_llama
from tests.rlhf.tiny_roles import FULL, LORA, Setting, left_padded

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ ' <end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
TEXTS = [
    ("\n\nHuman: 1 and 2?\n\nAssistant:", " 3, café!"),
    ("\n\nHuman: hi\n\nAssistant: yes\n\nHuman: and?\n\nAssistant:", " so it is"),
    ("\n\nHuman: what?\n\nAssistant:", "no"),
]
ENDED = [True, False, True]


def other_tokenizer(**options: object) -> PreTrainedTokenizerFast:
    """Bytes in the opposite order, ids and names of special tokens of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    pieces = [*alphabet, "<begin>", "<void>", "<end>"]
    merges = options.pop("merges", [])
    pieces += ["".join(pair) for pair in merges]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if options.pop("begins", False):
        backend.post_processor = processors.TemplateProcessing(
            "<begin> $A", None, [("<begin>", 256)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"pad_token": "<void>", "bos_token": "<begin>", "eos_token": "<end>", **options},
    )


READERS = {
    "other ids": {},
    "its own start": {"begins": True},
    "longer tokens": {"merges": [("o", "k"), ("c", "a"), ("ca", "f"), ("Ġ", "s"), ("Ġs", "o")]},
    "a chat template": {"chat_template": TEMPLATE, "prompt_format": "chat"},
}


def sampled(tokenizer, answer: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """The texts as a rollout leaves them: padded on the left, then answers padded on the right."""
    batch = left_padded([tokenizer(prompt)["input_ids"] for prompt, _ in TEXTS])
    rows = []
    for (prompt, text), ended in zip(TEXTS, ENDED, strict=True):
        ids = tokenizer(prompt + text)["input_ids"][len(tokenizer(prompt)["input_ids"]) :]
        rows.append([*ids, *([tokenizer.eos_token_id] if ended else [])])
    padding = tokenizer.pad_token_id
    answers = torch.tensor([[*row, *[padding] * (answer - len(row))] for row in rows])
    kept = torch.arange(answer) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    ids = torch.cat([batch.input_ids, answers], dim=1)
    return ids, torch.cat([batch.attention_mask, kept], dim=1)


def pairs_of_step_2(tokenizer) -> list[dict]:
    """The texts as step 2 turns them into rows; the rejected answer does not matter."""
    examples = [Example(prompt, answer, "?") for prompt, answer in TEXTS]
    columns = Converter(tokenizer, choose_format(tokenizer), 2, 64, None)(examples, Counter())
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


@pytest.fixture
def reward(tmp_path):
    """Saves a reward model under a tokenizer, and loads it as `rw_eval.py` does."""

    def make(tokenizer):
        torch.manual_seed(4)
        trunk = tiny_llama(4, vocab_size=280, max_position_embeddings=96).base_model
        model = RewardModel(trunk)
        save_hf_format(model, tokenizer, tmp_path / "reward", ALONE)
        return create_critic_model(str(tmp_path / "reward"), tokenizer, torch.float32).eval()

    return make


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_scores_are_those_of_the_text(name, lora, reward, folders, distributed, tmp_path):
    """Against step 2's rows under `rw_eval.py`'s scores; without an end, those rows without it."""
    source, reader = byte_tokenizer(), other_tokenizer(**READERS[name])
    model = reward(reader)
    setting = Setting(lora=lora)
    roles = setting.load(
        folders["llama"],
        distributed,
        reward=setting.frozen(tmp_path / "reward"),
        retokenise=Retokeniser.between(source, reader, "reward", 96),
    )
    assert roles.reward is not None and roles.critic.module.reward_head is None
    sequences, mask = sampled(source)
    scores = roles.reward_scores(sequences, mask, 12)
    for row, pair in enumerate(pairs_of_step_2(reader)):
        if not ENDED[row]:
            pair["chosen_ids"] = pair["chosen_ids"][: -1 - (name == "a chat template")]
        with torch.no_grad():
            expected, _ = pair_scores(model, PairCollator(reader.pad_token_id)([pair]))
        torch.testing.assert_close(scores[row], expected[0], atol=NEAR_ONE, rtol=0)
    assert scores.unique().numel() == len(TEXTS)


def test_the_same_weights_under_another_vocabulary_give_the_same_scores(
    folders, distributed, tmp_path
):
    """The critic's folder with its rows in the order of other ids: as if nothing were turned."""
    source, reader = byte_tokenizer(), other_tokenizer()
    model = create_critic_model(str(folders["llama"].critic), source, torch.float32)
    table = model.rwtransformer.embed_tokens.weight
    of_piece = source.get_vocab() | {"<begin>": 1, "<void>": 0, "<end>": EOS}
    order = [of_piece[piece] for piece in reader.convert_ids_to_tokens(range(len(reader)))]
    with torch.no_grad():
        table[: len(order)] = table[order]
    save_hf_format(model, reader, tmp_path / "twin", ALONE)
    sequences, mask = sampled(source)
    scores = []
    for changes in (
        {},
        {
            "reward": Setting().frozen(tmp_path / "twin"),
            "retokenise": Retokeniser.between(source, reader, "twin", 96),
        },
    ):
        roles = Setting(lora=LORA).load(folders["llama"], distributed, **changes)
        scores.append(roles.reward_scores(sequences, mask, 12))
    torch.testing.assert_close(scores[1], scores[0], atol=NEAR_ONE, rtol=0)


def words(ids: torch.Tensor, mask: torch.Tensor, tokenizer) -> list[str]:
    return [tokenizer.decode(row[real]) for row, real in zip(ids, mask, strict=True)]


def test_what_a_tokenizer_adds_is_no_text():
    """Its start in front, a space that it would lose, special tokens that were sampled."""
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate("▁:abcdefghij?")}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    source = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    source.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", None, [("<s>", source.bos_token_id)]
    )
    reader = other_tokenizer()
    prompt, answer = source("a b:")["input_ids"], source("a", add_special_tokens=False)["input_ids"]
    assert source.decode(answer) == "a"  # alone, its space is lost
    row = [*prompt, *answer, source.bos_token_id, source.eos_token_id]
    turn = Retokeniser.between(source, reader, "reward", None)
    ids, mask = turn(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool), 4)
    assert words(ids, mask, reader) == ["a b: a<end>"]


def test_long_texts_lose_the_beginning_of_the_prompt():
    source, reader = byte_tokenizer(), other_tokenizer(begins=True)
    turn = Retokeniser.between(source, reader, "reward", 20)
    ids, mask = turn(*sampled(source), 12)
    assert mask.sum(-1).max() == 20
    texts = words(ids, mask, reader)
    assert texts[1] == "<begin>Assistant: so it is"
    assert [text.endswith("<end>") for text in texts] == ENDED
    assert all(text.startswith("<begin>") for text in texts)


def test_the_same_tokenizer_needs_no_turning():
    assert Retokeniser.between(byte_tokenizer(), byte_tokenizer(), "reward", 64) is None


@pytest.mark.parametrize(
    "ours, theirs, says",
    [
        (
            TEMPLATE,
            None,
            "trained with the prompt format 'dschat', but .* with 'chat', and a prompt",
        ),
        (
            TEMPLATE,
            TEMPLATE.replace("']'", "'>'").replace("tant]", "tant>"),
            "its chat template is not that of .*; train both",
        ),
    ],
)
def test_prompts_in_a_template_cannot_be_read_back(ours, theirs, says):
    both = [other_tokenizer(chat_template=template) for template in (ours, theirs)]
    with pytest.raises(UserError, match=f"^reward: {says}"):
        Retokeniser.between(*both, "reward", None)


NAMED = "what is <end>, <begin> and <void>?"


def read(source, reader, prompt: list[int], answer: list[int]) -> list[int]:
    """The reader's ids for one sampled row."""
    turn = Retokeniser.between(source, reader, "reward", None)
    row = torch.tensor([[*prompt, *answer]])
    ids, mask = turn(row, torch.ones_like(row, dtype=torch.bool), len(answer))
    return ids[0][mask[0]].tolist()


def prompt_of(tokenizer, prompt, keeps: bool) -> list[int]:
    """A prompt of step 3."""
    form = choose_format(tokenizer)
    columns = Converter(tokenizer, form, 3, 128, None, keeps)([Example(prompt)], Counter())
    return columns["prompt_ids"][0]


@pytest.mark.parametrize("keeps", [False, True], ids=["letters", "tokens"])
@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["dschat", "chat"])
def test_names_in_prompts_are_what_they_were_for_the_source(template, keeps):
    """As step 2 reads the same row: letters, or with keep_special_tokens the tokens."""
    merges = [("h", "a"), ("i", "s")]
    source = other_tokenizer(chat_template=template, merges=merges)
    reader = other_tokenizer(chat_template=template)
    asked = (Turn("user", NAMED), Turn("assistant", "yes"), Turn("user", "so <end>"))
    answer = source(" it <" if template is None else "it < ")["input_ids"]
    prompt = prompt_of(source, asked, keeps)
    ids = read(source, reader, prompt, [*answer, source.eos_token_id])
    step_2 = Converter(reader, choose_format(reader), 2, 128, None, keeps)
    columns = step_2([Example(asked, "it <", "?")], Counter())
    assert ids == columns["chosen_ids"][0]
    assert ids.count(reader.convert_tokens_to_ids("<void>")) == keeps


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["dschat", "chat"])
def test_names_of_the_readers_own_are_letters(template):
    """The source does not know them: a prompt and an answer that hold them."""
    source, reader = byte_tokenizer(), other_tokenizer(chat_template=template)
    prompt = prompt_of(source, (Turn("user", NAMED),), False)
    ids = read(source, reader, prompt, source(" <end> is <void>")["input_ids"])
    expected = prompt_of(reader, (Turn("user", NAMED),), False)
    assert ids[: len(expected)] == expected
    special = {reader.convert_tokens_to_ids(name) for name in ("<end>", "<begin>", "<void>")}
    assert not special & set(ids)


def test_one_template_in_two_vocabularies_is_text():
    reader = other_tokenizer(chat_template=TEMPLATE)
    merges = [("h", "i"), ("u", "s"), ("us", "e")]
    source = other_tokenizer(chat_template=TEMPLATE, merges=merges)
    turn = Retokeniser.between(source, reader, "reward", None)
    row = source("[user]hi[assistant]yes <end>", add_special_tokens=False)["input_ids"]
    ids, mask = turn(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool), 5)
    assert words(ids, mask, reader) == ["[user]hi[assistant]yes <end>"]
    assert ids[0].tolist() != row
