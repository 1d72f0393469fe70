"""The glossary in CONTRIBUTING: its terms are those of the library's names, texts and comments.

Whether a term has its own sense no test sees. What it sees are the other words for the same things,
which stand here beside each term, and words that are no plain technical English.
"""

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Term → the words that others use for it, or that were once used here: regular expressions.
OTHERS = {
    "base model": "foundation models?|backbones?",
    "trunk": "backbones?|headless",
    "head": "output layer|unembedding|classifier head",
    "adapter": "lora (weight|delta)s|adaptors?",
    "lora_A, lora_B": "lora (left|right|up|down)|(left|right) weights?",
    "lora_dim": "(lora|adapter) ranks?",
    "token rows": "(trained|trainable) embeddings?",
    "ratio": "(rate|lambda) ratio",
    "parameter group": "(optimizer|rate) groups?",
    "merge, fuse": "bak(e|ed|es) in|absorb(s|ed)?|unfuses?",
    "freeze": "lock(s|ed)? (weights|parameters|layers)",
    "model folder": "model director(y|ies)",
    "step": "training stages?",
    "run": "experiments?",
    "recipe": "training (program|entry point)s?",
    "setting, flag": "hyper-?parameters?|command line (option|switch)(es)?",
    "rank": "workers? rank|rank ids?|replica number",
    "shard, gather": "partition(s|ed)? (weight|parameter)s?",
    "optimizer step": "(weight|gradient) updates?|update steps?",
    "micro-batch": "mini-? ?batch(es)?|sub-?batch(es)?",
    "accumulation group": "accumulation (window|cycle)s?",
    "epoch": "data pass(es)?",
    "checkpoint": "snapshots?|training states?|savepoints?",
    "throughput, FLOPs, MFU": "flop count rate|utili[sz]ation rate",
    "source": "data ?set paths?|corpora",
    "row": "(data|training) points?|datum",
    "reader": "row parsers?|row loaders?",
    "example": "(data|training) instances?",
    "turn": "utterances?|dialogue turns?",
    "phase": "(data|training) stages?",
    "split": "subset split|partition of (the|a) (source|set)",
    "prompt, answer": "repl(y|ies)(?! with)|utterances?",
    "prompt format, chat template": "prompt templates?|chat formats?|conversation templates?",
    "end token": "stop tokens?|end of (text|turn) tokens?",
    "truncate, drop": "discard(s|ed)?|crop(s|ped)?|clip(s|ped)? (prompts?|texts?)",
    "item": "data items?|elements? of (the|a) batch",
    "pad, pack, collate": "concatenat(e|ed) rows|batchif(y|ies|ied)",
    "actor, reference, critic, reward model": "policy models?|ref(erence)? polic(y|ies)|"
    "value models?|value networks?|rm model|sft policy",
    "rollout": "trajector(y|ies)|episodes?",
    "experience": "replay buffers?|transitions?",
    "iteration": "(ppo|outer) steps?|rounds? of ppo",
    "answer mask": "(action|response|completion) masks?",
    "log-probability": "log[- ]probs?|logps?",
    "score, reward": "preference scores?",
    "value, return, advantage": "value estimates?|rewards? to go",
    "whitening": "advantage normali[sz]ation|standardi[sz](e|es|ed|ation)",
    "KL: k1, k3": "kl div\\b|kl distance|kld",
    "estimator": "advantage (method|algorithm|kind)s?",
    "PTX": "pre-?training mix(ture)?|unsupervised loss",
}
# Words of another kind of English, and the plain ones.
PLAIN = {
    "anew": "again",
    "begun": "started",
    "behind": "after, of",
    "foretold|foretells?": "predicted",
    "mend(s|ed|ing)?": "fix",
    "learnt": "learned",
    "of no use": "unusable",
    "told": "reported, given, stated",
    "without end(?! token)": "endless, unbounded",
    "the like": "similar",
}


def words_of(path: Path) -> list[tuple[int, str]]:
    """Docstrings, messages, comments and the names of what is defined, each with its line."""
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(text)):
        line = getattr(node, "lineno", 1)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            found.append((line, node.value))
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.append((line, node.name))
        elif isinstance(node, ast.arg):
            found.append((line, node.arg))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append((line, node.id))
    return found


@cache
def library() -> dict[str, str]:
    """Words of the library and the recipes by place."""
    found = {}
    for room in ("dschat", "training", "inference"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for number, (line, text) in enumerate(words_of(path)):
                found[f"{path.relative_to(ROOT)}:{line} ({number})"] = text
    return found


def hits(pattern: str, names: bool = True) -> list[str]:
    """Places where a pattern stands as words, in texts and, if `names`, in names."""
    found = re.compile(rf"\b({pattern})\b", re.I)
    # In backquotes and quotation marks stand names of others.
    plain = re.compile(r"`[^`]*`|\"[^\"]*\"")
    return [
        f"{place}: {match[0]}"
        for place, text in library().items()
        if (names or " " in text)
        and (match := found.search(plain.sub("", text) if " " in text else text.replace("_", " ")))
    ]


def test_every_term_of_the_glossary_is_checked():
    glossary = (ROOT / "CONTRIBUTING.md").read_text().split("## Glossary")[1].split("\n## ")[0]
    terms = [t for t in re.findall(r"^\| (.+?) \|", glossary, re.M) if t not in ("term", "---")]
    assert terms == list(OTHERS)


@pytest.mark.parametrize("term", OTHERS)
def test_a_thing_has_one_word(term):
    assert hits(OTHERS[term]) == []


@pytest.mark.parametrize("word", PLAIN)
def test_words_are_plain(word):
    assert hits(word, names=False) == []
