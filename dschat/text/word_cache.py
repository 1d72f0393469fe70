"""Token ids of texts from those of their words: each word goes through the tokenizer once.

Byte-pair tokenizers of today's models cut a text in front of a space that follows anything but
white space, whatever the rest of the text is, and merge nothing across that cut. Where a tokenizer
is known to do so, the ids of a text are those of its words one after the other, and looking them
up is many times faster than the tokenizer. Everywhere else there is no cache.
"""

from __future__ import annotations

import json
import re
from array import array
from itertools import count, filterfalse, pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

_MAX_WORDS = 1_000_000  # about 200 MB; a set with more begins anew
_WORDS_PER_CALL = 64
_SENTINEL = "x"

# The split patterns of Llama 3 and of Qwen 2. Both begin a token at such a space: none of their
# branches has a space after another character.
_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
}
# Probe texts: cached ids must equal the tokenizer's.
_PROBES = (
    "It's a test,  isn't it?\n\nHuman: I’d say 12345 times \n\n Yes!\r\n\tÀ ü é 漢字 かな 🙂👍🏽 ",
    " a b  c   d\n e\t f \u3000g\u00a0h \u200bi <b>x</b> $5.00 #1 ... ''s 'S don'T x_y x-y\\n ",
    "def f(x):\n    return x  # Kommentar\n\n\n\nÅngström e\u0301a \u0308b ½ ² ٣ Ⅳ 1 2 34 567 8901",
)


class Words(NamedTuple):
    """The words of some texts, without the spaces in front of them."""

    names: list[str]  # each word once
    of_text: np.ndarray  # (words of all texts,) int; places in `names`
    first: np.ndarray  # (texts,) int; where each text begins in `of_text`


def cut_words(texts: list[str]) -> Words:
    """Cut texts, at least one, at each space that follows no white space.

    Arrow cuts, and numbers the words: far fewer than there are in the texts are left for Python.
    """
    rows = pc.split_pattern(pa.array(texts, pa.large_string()), " ")
    begins = rows.offsets.to_numpy()[:-1]
    parts = rows.flatten().dictionary_encode()
    names, codes = parts.dictionary.to_pylist(), parts.indices.to_numpy()
    # After white space a space is no cut: such a part and the next are one word.
    ends = pc.utf8_slice_codeunits(parts.dictionary, -1).dictionary_encode()
    spaces = [not end or end.isspace() for end in ends.dictionary.to_pylist()]
    binds = np.array(spaces)[ends.indices.to_numpy()]
    starts = np.ones(len(codes), bool)
    starts[1:] = ~binds[codes[:-1]]
    starts[begins] = True
    bounds = np.append(np.flatnonzero(starts), len(codes))
    of_text = codes[bounds[:-1]].astype(np.int64)
    long = np.flatnonzero(np.diff(bounds) > 1)
    numbers: dict[tuple[int, ...], int] = {}
    spans = zip(long.tolist(), bounds[long].tolist(), bounds[long + 1].tolist(), strict=True)
    for word, start, stop in spans:
        some = tuple(codes[start:stop].tolist())
        of_text[word] = numbers.setdefault(some, len(binds) + len(numbers))
    names += [" ".join([names[code] for code in some]) for some in numbers]
    return Words(names, of_text, np.searchsorted(bounds, begins))


class WordCache:
    """Ids of the words that one tokenizer has seen; get it with `word_cache`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.backend = tokenizer.backend_tokenizer
        added = [re.escape(token) for token in tokenizer.get_added_vocab()]
        # Metaspace tokenizers write a space as ▁; one in the text could not be told from it.
        self._special = re.compile("|".join([*added, "▁"])).search
        self._first_chars = {token[0] for token in tokenizer.get_added_vocab()} | {"▁"}
        self._sentinel = len(self.backend.encode(_SENTINEL, add_special_tokens=False).ids)
        # A word follows a space, which is part of it. At the beginning of a text there is no
        # cut, and some tokenizers put a space of their own there: (word, special) is one there.
        self._numbers: dict[str | tuple[str, bool], int] = {}
        self._ids, self._bounds = array("i"), array("q", [0])  # of word n: bounds n and n + 1

    def fits(self, text: str) -> bool:
        """Tell whether the ids of `text` are those of its words: no special token is in it."""
        return not (any(c in text for c in self._first_chars) and self._special(text))

    def encode(self, texts: list[str], special: bool | None) -> list[list[int]]:
        """Encode texts that `fits` holds for.

        Args:
            special: with the tokenizer's own BOS, or without. None: the texts begin with a space
                and follow a text that does not end in one.
        """
        if not texts:
            return []
        if len(self._numbers) > _MAX_WORDS:
            self._numbers.clear()
            del self._ids[:], self._bounds[1:]
        words = cut_words(texts if special is not None else [text[1:] for text in texts])
        after = np.ones(len(words.of_text), bool)  # words that follow a space
        after[words.first] = special is None
        used = np.zeros(len(words.names), bool)
        used[words.of_text[after]] = True
        number = np.zeros(len(words.names), np.int64)
        number[used] = self._look_up([words.names[word] for word in np.flatnonzero(used).tolist()])
        pieces = number[words.of_text]
        if special is not None:
            heads = words.of_text[words.first].tolist()
            pieces[words.first] = self._look_up([(words.names[word], special) for word in heads])
        bounds = np.asarray(self._bounds)
        begins = bounds[pieces]
        sizes = bounds[pieces + 1] - begins
        stops = np.cumsum(sizes)
        # Place of each id: as far after its word's first id there as here.
        places = np.arange(stops[-1]) + np.repeat(begins - (stops - sizes), sizes)
        ids = np.asarray(self._ids)[places].tolist()
        cuts = [*(stops - sizes)[words.first].tolist(), len(ids)]
        return [ids[start:stop] for start, stop in pairwise(cuts)]

    def _look_up(self, words: list) -> np.ndarray:
        """Give the numbers of words, which are learnt first where they are new."""
        if new := list(dict.fromkeys(filterfalse(self._numbers.__contains__, words))):
            self._learn(new)
        return np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))

    def _learn(self, words: list) -> None:
        """Encode new words, many after one another in each text, and tell them apart again."""
        is_head = isinstance(words[0], tuple)
        if is_head:
            groups, texts = [[head] for head in words], [word for word, _ in words]
        else:
            # After white space a space is no cut.
            last = [word for word in words if not word or word[-1].isspace()]
            inner = [word for word in words if word and not word[-1].isspace()]
            groups = [inner[i : i + _WORDS_PER_CALL] for i in range(0, len(inner), _WORDS_PER_CALL)]
            groups += [[word] for word in last]
            texts = [" ".join([_SENTINEL, *group]) for group in groups]
        # An earlier call may have left truncation and padding switched on.
        self.backend.no_truncation()
        self.backend.no_padding()
        encoded = self.backend.encode_batch(texts, add_special_tokens=is_head and words[0][1])
        for group, encoding in zip(groups, encoded, strict=True):
            ids, bounds = encoding.ids, np.array([len(encoding.ids)])
            if not is_head:
                stops = len(_SENTINEL) + np.cumsum([1 + len(word) for word in group])
                ends = np.maximum.accumulate([stop for _, stop in encoding.offsets])
                # A word has all ids up to the first that ends after it, the last word has the rest.
                cuts = np.searchsorted(ends, stops[:-1], side="right")
                ids, bounds = ids[self._sentinel :], np.append(cuts, len(ends)) - self._sentinel
            self._bounds.extend((len(self._ids) + bounds).tolist())
            self._ids.extend(ids)
            self._numbers.update(zip(group, count(len(self._numbers)), strict=False))


CACHES: WeakKeyDictionary[PreTrainedTokenizerBase, WordCache | None] = WeakKeyDictionary()


def word_cache(tokenizer: PreTrainedTokenizerBase) -> WordCache | None:
    """Give the cache of a tokenizer; None where the ids of words may not be those of the text."""
    if tokenizer not in CACHES:
        backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
        cache = WordCache(tokenizer) if backend and cuts_before_spaces(backend) else None
        texts = list(_PROBES)
        is_right = (
            cache is not None
            and all(map(cache.fits, texts))
            and all(
                cache.encode(texts, special)
                == tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
                for special in (False, True)
            )
        )
        CACHES[tokenizer] = cache if is_right else None
    return CACHES[tokenizer]


def cuts_before_spaces(backend: dict) -> bool:
    """Tell whether a tokenizer (its tokenizer.json) never merges across a cut before a space."""
    model = backend["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("end_of_word_suffix"):
        return False
    if model.get("continuing_subword_prefix"):
        return False
    normalizer, split = backend["normalizer"] or {}, backend["pre_tokenizer"] or {}
    # The parts of a sequence, a lone part, or none.
    normalizers = normalizer.get("normalizers", [normalizer] if normalizer else [])
    parts = split.get("pretokenizers", [split] if split else [])
    names = [part["type"] for part in parts]
    if names[-1:] == ["ByteLevel"]:
        if not all(n["type"] == "NFC" for n in normalizers):
            return False
        *before, last = parts
        splits = [p for p in before if p["type"] != "Digits"]
        if last["use_regex"]:  # GPT-2's pattern
            return not splits
        return len(splits) == 1 and (
            splits[0]["type"] == "Split"
            and splits[0]["behavior"] == "Isolated"
            and not splits[0]["invert"]
            and splits[0]["pattern"].get("Regex") in _PATTERNS
        )
    by_space = all(n["type"] in ("Prepend", "Replace") for n in normalizers) and all(
        n["pattern"] == {"String": " "} and n["content"] == "▁"
        for n in normalizers
        if n["type"] == "Replace"
    )
    if names == ["Metaspace"]:
        by_space = not normalizers and parts[0]["replacement"] == "▁"
    elif names or not normalizers:
        return False
    # Without a split the merges decide: no token has ▁ after anything else.
    return by_space and not any(re.search("[^▁]▁", token) for token in model["vocab"])
