"""Load a tokenizer under one end-of-answer convention; compare tokenizers."""

import os
from pathlib import Path
from weakref import WeakSet

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dschat.errors import UserError, brief
from dschat.text.formats import CONFIG_KEY, choose_format, set_format
from dschat.utils.module.model_source import OWN_CODE, is_local, resolve_model, wants_own_code
from dschat.utils.predecessor import changed

_WITH_NEW_END: WeakSet[PreTrainedTokenizerBase] = WeakSet()
PROBE = "Two  Áé words: 12345, NEW\n\tlines; it's \u4e2d\u6587 - don't x.y(z)."
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@changed("load_hf_tokenizer(path, add_eot_token=False); every tokenizer is a fast one")
def load_hf_tokenizer(
    model_name_or_path: str, *, add_eot_token: bool = False, eot_token: str = "<|endoftext|>"
) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer whose `eos_token` ends answers in every step and whose pad is set.

    With `add_eot_token`, `eot_token` is added if unknown and becomes the `eos_token`, so a saved
    folder carries the convention. An own pad token is kept; a missing one becomes the eos token.

    Raises:
        UserError: no such folder or Hub name, no tokenizer files in it, or no end token.
    """
    name = tokenizer_home(model_name_or_path)
    if is_local(name) and not _has_tokenizer(name):
        state = "holds no tokenizer files" if Path(name).is_dir() else "is not a folder"
        raise UserError(
            f"tokenizer {model_name_or_path!r} {state}: give a folder that holds tokenizer.json, "
            "or the name of a model on the Hub"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever a broken file of it leads to
        if wants_own_code(error):
            raise UserError(f"tokenizer {model_name_or_path!r}: {OWN_CODE}") from error
        is_said = isinstance(error, (OSError, ValueError, ImportError))
        raise UserError(
            f"tokenizer {model_name_or_path!r} does not load "
            f"({brief(error, with_type=not is_said)}): "
            "give a model folder, or the name of a model on the Hub that can be reached"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {model_name_or_path!r} has no fast version: save one with a tokenizer.json"
        )
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        raise UserError(
            f"tokenizer {model_name_or_path!r}: model_max_length is {longest!r}: give a number in "
            "its tokenizer_config.json, or remove it"
        )
    _set_special_tokens(tokenizer, model_name_or_path, eot_token if add_eot_token else None)
    return tokenizer


def tokenizer_home(model_name_or_path: str) -> str:
    """Find the tokenizer's folder: an adapter folder that holds none uses its base's."""
    source = resolve_model(model_name_or_path)
    for adapter in reversed(source.adapters):
        if _has_tokenizer(adapter.folder):
            return str(adapter.folder)
    return os.path.expanduser(source.base)


def _has_tokenizer(folder: str | Path) -> bool:
    return any((Path(folder) / file).is_file() for file in VOCABULARY_FILES)


def _set_special_tokens(
    tokenizer: PreTrainedTokenizerBase, name: str, eot_token: str | None
) -> None:
    if eot_token is not None:
        if not eot_token:
            raise UserError("--eot_token is empty: give the text of the end token")
        known = len(tokenizer)
        tokenizer.add_special_tokens({"eos_token": eot_token})
        if len(tokenizer) > known:
            _WITH_NEW_END.add(tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {name!r} has no end token: name one with --add_eot_token --eot_token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    with_special, plain = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    if with_special[-len(plain) :] != plain:
        # A prompt ending in such a token would ask the model to go on after the end.
        token = tokenizer.convert_ids_to_tokens(with_special[-1])
        raise UserError(
            f"tokenizer {name!r} appends {token!r} to every text: switch that off in its "
            "tokenizer.json (post_processor) or with add_eos_token"
        )


def end_is_new(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether loading added the end token to the vocabulary: no model knows it yet."""
    return tokenizer in _WITH_NEW_END


def check_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model_name_or_path: str, eot_token: str | None = None
) -> None:
    """Check that two models have the same token ids and the same prompt format.

    Raises:
        UserError: the model's own tokenizer differs in vocabulary, special tokens or format, or
            cuts text up otherwise.
    """
    shared = choose_format(tokenizer).name
    other = load_hf_tokenizer(
        model_name_or_path,
        add_eot_token=eot_token is not None,
        eot_token=eot_token or "<|endoftext|>",
    )
    stored = other.init_kwargs.get(CONFIG_KEY, shared)
    if stored != shared:
        raise UserError(
            f"{model_name_or_path}: trained with the prompt format {stored!r}, but "
            f"{tokenizer.name_or_path} with {shared!r}; train both with one --prompt_format"
        )
    set_format(other, shared, end_is_given=eot_token is not None)
    if shared == "chat" and other.chat_template != tokenizer.chat_template:
        raise UserError(
            f"{model_name_or_path}: its chat template is not that of {tokenizer.name_or_path}; "
            "train both with one template, or with --prompt_format dschat"
        )
    same_ends = other.eos_token_id == tokenizer.eos_token_id
    same_pieces = other(PROBE)["input_ids"] == tokenizer(PROBE)["input_ids"]
    if other.get_vocab() != tokenizer.get_vocab() or not same_ends or not same_pieces:
        raise UserError(
            f"{model_name_or_path}: its tokenizer is not that of {tokenizer.name_or_path}; "
            "train actor and reward model from models with one tokenizer"
        )
