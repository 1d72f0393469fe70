"""Names of special tokens that stand in a user's text: ordinary text there, not the tokens.

Tokenizers take `</s>` for the end token wherever it stands. `as_ordinary` marks such names in the
text of a row before a prompt format writes around it, and encoding reads what is marked as letters
like any others; the format's own tokens stay what they are.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.text.conversations import Example, Turn

# After the first character of a name. Half a surrogate pair: no text that is read can hold it.
MARK = "\udfff"


class SpecialNames:
    """Names of a tokenizer's special tokens, to be found and marked in texts.

    `tokens` maps them to what the tokenizer knows of them; `pattern` finds an unmarked one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        self.tokens = {token.content: token for token in added if token.special and token.content}
        names = sorted(self.tokens, key=len, reverse=True)
        self.pattern = re.compile(
            f"(?:{'|'.join(map(re.escape, names))})(?!{MARK})" if names else "(?!)"
        )

    def mark(self, text: str) -> str:
        """Mark every name in a text that is none of a prompt format's."""
        while self.pattern.search(text):  # what is left of one name may be part of another
            text = self.pattern.sub(lambda match: match[0][0] + MARK + match[0][1:], text)
        return text


def as_ordinary(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Mark every name of a special token in one text."""
    return SpecialNames(tokenizer).mark(text)


def ordinary_examples(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> tuple[list[Example], int]:
    """Mark the names in all texts of examples; count the examples that hold some.

    End tokens at the end of an answer are the row's own way to end it, and are taken off: one is
    put there in any case.
    """
    names, eos, count = SpecialNames(tokenizer), tokenizer.eos_token, 0

    def text_of(text: str, is_answer: bool) -> str:
        return names.mark(_without_ends(text, eos) if is_answer else text)

    marked = []
    for e in examples:
        turns = (Turn("user", e.prompt),) if isinstance(e.prompt, str) else e.prompt
        sides = [e.chosen, e.rejected]
        texts = [*(t.text for t in turns), *filter(None, sides)]
        if not any(map(names.pattern.search, texts)):
            marked.append(e)
            continue
        turns = tuple(Turn(t.role, text_of(t.text, t.role == "assistant")) for t in turns)
        sides = [side and text_of(side, True) for side in sides]
        count += any(MARK in text for text in (*(t.text for t in turns), *filter(None, sides)))
        prompt = turns[0].text if isinstance(e.prompt, str) else turns
        marked.append(replace(e, prompt=prompt, chosen=sides[0], rejected=sides[1]))
    return marked, count


def ordinary_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[list[str], int]:
    """Mark the names in texts, each of which ends as an answer does; count those that hold some."""
    names, eos = SpecialNames(tokenizer), tokenizer.eos_token
    marked = [names.mark(_without_ends(text, eos)) for text in texts]
    return marked, sum(MARK in text for text in marked)


def _without_ends(text: str, eos: str) -> str:
    """Take end tokens off a text's end, and the white space between and after them."""
    while text.rstrip().endswith(eos):
        text = text.rstrip().removesuffix(eos)
    return text


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Collect the ids of all special tokens."""
    of_backend = map(tokenizer.backend_tokenizer.token_to_id, SpecialNames(tokenizer).tokens)
    return {token for token in of_backend if token is not None} | set(tokenizer.all_special_ids)


def without_marks(text: str) -> str:
    """Remove the marks: the text as its author wrote it."""
    return text.replace(MARK, "")


@dataclass(frozen=True)
class _Reader:
    """A copy of a tokenizer in which special tokens have names that no text can hold."""

    backend: Tokenizer
    names: dict[str, str]  # of a special token → its name here
    ids: dict[int | None, int]  # of a name here → the special token's


_READERS: WeakKeyDictionary[PreTrainedTokenizerBase, _Reader] = WeakKeyDictionary()


def _reader(tokenizer: PreTrainedTokenizerBase) -> _Reader:
    tokens = SpecialNames(tokenizer).tokens
    if tokenizer not in _READERS or _READERS[tokenizer].names.keys() != tokens.keys():
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.encode_special_tokens = True  # as text; the new names are no special tokens
        backend.no_truncation()
        backend.no_padding()
        secret = uuid.uuid4().hex
        names = {name: f"\U0010fffe{secret}{n}\U0010fffe" for n, name in enumerate(tokens)}
        for name, token in tokens.items():
            # Alike in all else, so that the text around is read as it is around the token.
            alike = {
                k: getattr(token, k) for k in ("single_word", "lstrip", "rstrip", "normalized")
            }
            backend.add_tokens([AddedToken(names[name], special=False, **alike)])
        ids = {
            backend.token_to_id(new): tokenizer.backend_tokenizer.token_to_id(old)
            for old, new in names.items()
        }
        _READERS[tokenizer] = _Reader(backend, names, ids)
    return _READERS[tokenizer]


def encode_marked(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool
) -> list[list[int]]:
    """Encode texts in which names are marked, with the tokenizer's own BOS if `special`."""
    reader, pattern = _reader(tokenizer), SpecialNames(tokenizer).pattern
    named = [
        without_marks(pattern.sub(lambda match: reader.names[match[0]], text)) for text in texts
    ]
    unknown, specials = tokenizer.unk_token_id, set(reader.ids.values())
    rows = []
    for encoding in reader.backend.encode_batch(named, add_special_tokens=special):
        row = []
        for token, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if not added and token in specials and token != unknown:
                # A model of whole words knows the name as a word.
                if unknown is None:
                    name = tokenizer.convert_ids_to_tokens(token)
                    raise UserError(
                        f"tokenizer {tokenizer.name_or_path!r} cannot write {name!r} but as its "
                        "special token; take it out of the rows, or give keep_special_tokens"
                    )
                token = unknown
            row.append(reader.ids.get(token, token))
        rows.append(row)
    return rows
