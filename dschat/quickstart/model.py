"""Tiny model folder of the embedded default: a Llama of random weights and its tokenizer."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dschat.models.loading import quiet_transformers
from dschat.quickstart import world

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCAB_SIZE = 1024  # an upper limit: merges end when every word of the corpus is one token
MAX_LENGTH = 512
MAX_NEW_TOKENS = 32  # the longest answer of the world has fewer tokens

# Words with their leading space, runs of line breaks, digits one by one, runs of punctuation.
# A break before "Assistant:" and a space before an answer never share a token with their neighbour,
# so a prompt tokenised alone is always a prefix of prompt plus answer.
_PIECES = r" ?[A-Za-z]+| ?[0-9]|\n+| ?[^\sA-Za-z0-9]+|\s"

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\\n\\nAssistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('role ' + message['role'] + ': use user or assistant') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)


def corpus() -> list[str]:
    """Collect the tokenizer's training texts: every prompt and true sentence of the world."""
    phrases = [p for ends in (world.OPENERS, world.CLOSERS) for ps in ends.values() for p in ps]
    truths = [sentence for fact in world.all_facts() for sentence in fact.statements()]
    sentences = [*phrases, *world.EVASIONS, *truths]
    return [*world.fact_of_prompt(), *(f" {sentence}" for sentence in sentences)]


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with distinct pad, bos and eos; any text at all can be encoded.

    It puts bos before a text and nothing after it: the end token is the pipeline's to add.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            min_frequency=1,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, backend.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
        prompt_format="dschat",  # of its data; the template, for others, writes the same text
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Make a Llama of about half a million random weights, the same for the same seed.

    The caller's random state is left as it was.
    """
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,  # the usual 0.02 starts a model this narrow too close to zero
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=MAX_NEW_TOKENS,
        **special,
    )
    return model


def write_model(folder: Path, seed: int) -> None:
    """Write a model folder that `transformers` loads offline: weights, config, tokenizer."""
    tokenizer = build_tokenizer(corpus())
    with quiet_transformers():
        build_model(tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
