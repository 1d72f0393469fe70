"""Task of the embedded default: supervised rows, preference pairs and the gold rule.

Supervised rows answer in every manner, preferences say which manner is wanted, and the gold rule
judges the answers of a trained model from outside: no reward model and no PPO ever sees it.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dschat.errors import UserError
from dschat.quickstart import world

KINDS = ("good", "plain", "rude", "evasive", "rambling", "off_topic", "garbled", "wrong")
SFT_SHARES = (0.45, 0.2, 0.2, 0.13, 0.0, 0.01, 0.0, 0.01)
REJECTED_SHARES = (0.0, 0.16, 0.18, 0.1, 0.12, 0.08, 0.12, 0.24)  # the chosen side is good
SAME_ENDS = 0.6  # share of pairs differing in the body alone, among those whose fault lies there
LABEL_NOISE = 0.02  # share of training pairs whose sides are swapped, as people also err

_SENTENCE = re.compile(r" [^.!]+[.!]")


@dataclass(frozen=True)
class GoldScore:
    """Shares of answers in [0, 1]: those that satisfy the gold rule, those that are well-formed."""

    gold: float
    well_formed: float


def _manner_of(sentence: str, phrases: Mapping[str, Sequence[str]]) -> str | None:
    """Find the manner whose phrases hold `sentence`, or None."""
    return next((manner for manner, known in phrases.items() if sentence in known), None)


def _parse(answer: str) -> tuple[set[str], str] | None:
    """Take an answer apart by the grammar [opener] (evasion | statement) [closer].

    Returns:
        Manners of the ends, and the sentence between them; None for any other text.
    """
    pieces = _SENTENCE.findall(answer)
    if not pieces or "".join(pieces) != answer:
        return None
    said = [piece[1:] for piece in pieces]
    opener, closer = _manner_of(said[0], world.OPENERS), _manner_of(said[-1], world.CLOSERS)
    body = said[opener is not None : len(said) - (closer is not None)]
    if len(body) != 1 or not (body[0] in world.EVASIONS or body[0] in world.all_statements()):
        return None
    return {manner for manner in (opener, closer) if manner is not None}, body[0]


def well_formed(answer: str) -> bool:
    """Return whether the answer follows the grammar of the world, true or not.

    The answer is taken as the model continues the prompt, without the end token: one space before
    each sentence and nothing after the last.
    """
    return _parse(answer) is not None


def gold(prompt: str, answer: str) -> bool:
    """Return whether the answer is well-formed, courteous, and gives the fact in question alone.

    Courteous: a polite phrase at one end at least and a rude one at neither. Raises UserError for
    a prompt that is no question of the world, since no rule can judge its answer.
    """
    fact = world.fact_of_prompt().get(prompt)
    if fact is None:
        raise UserError(
            f"prompt {prompt!r}: not a question of the quickstart world, so the gold rule cannot "
            "judge its answer; use the prompts of the generated files"
        )
    manners, body = _parse(answer) or (set(), "")
    return body in fact.statements() and "polite" in manners and "rude" not in manners


def gold_score(prompts: Sequence[str], answers: Sequence[str]) -> GoldScore:
    """Judge one answer per prompt, both (N,); raises UserError on N = 0 or unequal lengths."""
    if not prompts or len(prompts) != len(answers):
        raise UserError(
            f"gold score of {len(prompts)} prompts and {len(answers)} answers: give one answer "
            "for each of at least one prompt"
        )
    right = sum(gold(p, a) for p, a in zip(prompts, answers, strict=True))
    formed = sum(well_formed(a) for a in answers)
    return GoldScore(right / len(prompts), formed / len(prompts))


def split_prompts(rng: random.Random) -> tuple[list[str], list[str]]:
    """Divide the prompts into those to train on and held-out ones: of each fact one wording.

    So no held-out prompt is trained on, but its fact is, in other wordings, and so is its wording,
    with other facts.
    """
    train, held_out = [], []
    for fact in world.all_facts():
        prompts = fact.prompts()
        held_out.append(prompts.pop(rng.randrange(len(prompts))))
        train.extend(prompts)
    return train, held_out


Ends = tuple[str, str]  # phrases before and after a body, each with its space, or empty


def _ends_of_kind(rng: random.Random, kind: str) -> Ends:
    """Draw a phrase before the body, after it, or both.

    A kind has its own manner, or any where the fault lies in the body.
    """
    own = {"good": "polite", "plain": "plain", "rude": "rude"}
    manner = own.get(kind, rng.choices(("polite", "plain", "rude"), (0.7, 0.15, 0.15))[0])
    shape = rng.choices(("open", "close", "both"), (0.4, 0.4, 0.2))[0]
    opener = f" {rng.choice(world.OPENERS[manner])}" if shape != "close" else ""
    closer = f" {rng.choice(world.CLOSERS[manner])}" if shape != "open" else ""
    return opener, closer


def _body(rng: random.Random, fact: world.Fact, kind: str) -> str:
    """Draw the body of an answer of `kind`."""
    if kind == "evasive":
        return rng.choice(world.EVASIONS)
    if kind == "off_topic":
        topic = rng.choice([topic for topic in world.TOPICS if topic is not fact.topic])
        return rng.choice(world.Fact(topic, rng.choice(list(topic.facts))).statements())
    if kind == "wrong":
        topic = fact.topic if rng.random() < 0.6 else rng.choice(world.TOPICS)
        value = rng.choice([v for v in topic.values if v != fact.value])
        return rng.choice(fact.statements(value))
    return rng.choice(fact.statements())


def _ramble(rng: random.Random, fact: world.Fact, ends: Ends) -> str:
    """Make a true answer that goes on too long: a sentence said twice, or one too many."""
    opener, closer = ends
    said = [s for s in (opener, f" {rng.choice(fact.statements())}", closer) if s]
    phrases = rng.choice((world.OPENERS, world.CLOSERS))["polite"]
    aside = rng.choice(rng.choice(list(world.all_facts())).statements())
    extra = rng.choice((rng.choice(said), f" {rng.choice((*phrases, aside))}"))
    said.insert(rng.randint(1, len(said)), extra)
    answer = "".join(said)
    return _ramble(rng, fact, ends) if well_formed(answer) else answer


def _garble(rng: random.Random, answer: str) -> str:
    """Make one slip of grammar: a few words lost, one doubled, or two swapped."""
    words = answer.split(" ")[1:]
    at = rng.randrange(len(words) - 1)
    lost = words[:at] + words[at + rng.randint(1, 2) :]
    doubled = words[: at + 1] + words[at:]
    swapped = [*words[:at], words[at + 1], words[at], *words[at + 2 :]]
    slip = " ".join(["", *rng.choice((lost, doubled, swapped))])
    return _garble(rng, answer) if well_formed(slip) else slip


def answer_of_kind(rng: random.Random, prompt: str, kind: str, ends: Ends | None = None) -> str:
    """Make an answer of one of `KINDS`, beginning with a space, without the end token."""
    if kind not in KINDS:
        raise UserError(f"kind of answer {kind!r}: unknown; choose from {', '.join(KINDS)}")
    fact = world.fact_of_prompt()[prompt]
    ends = opener, closer = _ends_of_kind(rng, kind) if ends is None else ends
    if kind == "rambling":
        return _ramble(rng, fact, ends)
    body = _body(rng, fact, kind)
    answer = f"{opener} {body}{closer}"
    return _garble(rng, answer) if kind == "garbled" else answer


def _cycle(rng: random.Random, prompts: Sequence[str], rows: int) -> list[str]:
    """Draw so many rows of prompts in random order; each prompt's count differs by one at most."""
    out: list[str] = []
    while len(out) < rows:
        out.extend(rng.sample(prompts, len(prompts)))
    return out[:rows]


def sft_rows(rng: random.Random, prompts: Sequence[str], rows: int) -> list[dict[str, str]]:
    """Supervised rows of mixed quality, columns prompt and response."""
    kinds = rng.choices(KINDS, SFT_SHARES, k=rows)
    return [
        {"prompt": prompt, "response": answer_of_kind(rng, prompt, kind)}
        for prompt, kind in zip(_cycle(rng, prompts, rows), kinds, strict=True)
    ]


def preference_rows(
    rng: random.Random, prompts: Sequence[str], rows: int, label_noise: float = 0.0
) -> list[dict[str, str]]:
    """Pairs of a good answer and one of another kind, columns prompt, chosen and rejected.

    `label_noise` in [0, 1] is the share of pairs that are swapped by chance.
    """
    out = []
    for prompt in _cycle(rng, prompts, rows):
        worse = rng.choices(KINDS, REJECTED_SHARES)[0]
        ends = _ends_of_kind(rng, "good")
        chosen = answer_of_kind(rng, prompt, "good", ends)
        keep = worse not in ("plain", "rude") and rng.random() < SAME_ENDS
        rejected = answer_of_kind(rng, prompt, worse, ends if keep else None)
        if rng.random() < label_noise:
            chosen, rejected = rejected, chosen
        out.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return out
