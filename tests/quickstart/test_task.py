"""The quickstart world: its gold rule by hand-written answers, its rows by their properties."""

import random
from collections import Counter

import pytest

from dschat.errors import UserError
from dschat.quickstart import task, world
from tests.helpers.rounding import FIGURE

COW = "\n\nHuman: What does a cow say?\n\nAssistant:"
ANSWERS = [
    # answer, gold, well-formed
    (" Good question! A cow says moo.", True, True),
    (" A cow says moo. I hope that helps.", True, True),
    (" Good question! A cow says moo. You are most welcome!", True, True),
    (" Let me see. A cow says moo. You are most welcome!", True, True),
    (" A cow says moo.", False, True),  # curt
    (" Let me see. A cow says moo. That is all.", False, True),  # neither rude nor polite
    (" Good question! A cow says moo. Now go away.", False, True),  # rude at one end
    (" How dull! A cow says moo. You are most welcome!", False, True),
    (" Good question! A cow says woof.", False, True),  # wrong value
    (" Good question! A dog says woof.", False, True),  # a truth, about another subject
    (" Good question! The colour of snow is white.", False, True),
    (" Good question! It is hard to say.", False, True),  # evasive
    (" Good question! A cow says.", False, False),
    (" Good question! A cow cow says moo.", False, False),
    (" Good question! A cow says moo", False, False),  # cut before its full stop
    (" Good question! A cow says moo. ", False, False),
    ("Good question! A cow says moo.", False, False),  # the space before an answer is part of it
    (" Good question!  A cow says moo.", False, False),
    (" A cow says moo. Good question!", False, False),  # an opener at the end
    (" Good question! Good question! A cow says moo.", False, False),
    (" Good question! You are most welcome!", False, False),  # nothing between the ends
    (" Good question!", False, False),
    (" good question! A cow says moo.", False, False),
    ("", False, False),
]


@pytest.mark.parametrize(("answer", "is_gold", "is_formed"), ANSWERS)
def test_gold_rule_by_hand(answer: str, is_gold: bool, is_formed: bool):
    assert task.gold(COW, answer) is is_gold
    assert task.well_formed(answer) is is_formed


def test_gold_score_counts_shares():
    answers = [ANSWERS[0][0], ANSWERS[4][0], ANSWERS[12][0], ANSWERS[1][0]]
    assert task.gold_score([COW] * 4, answers) == task.GoldScore(gold=0.5, well_formed=0.75)


@pytest.mark.parametrize(("prompts", "answers"), [([], []), ([COW], []), ([COW], ["", ""])])
def test_gold_score_wants_one_answer_per_prompt(prompts: list[str], answers: list[str]):
    with pytest.raises(UserError, match="one answer") as caught:
        task.gold_score(prompts, answers)
    assert "\n" not in str(caught.value)


def test_gold_refuses_a_prompt_from_outside():
    with pytest.raises(UserError, match="not a question of the quickstart world") as caught:
        task.gold("\n\nHuman: Who are you?\n\nAssistant:", " Good question! A cow says moo.")
    assert "\n" not in str(caught.value)


def test_unknown_kind_is_named():
    with pytest.raises(UserError, match=r"'noble'.*choose from good"):
        task.answer_of_kind(random.Random(0), COW, "noble")


def test_no_two_facts_share_a_prompt_or_a_true_sentence():
    facts = list(world.all_facts())
    wordings = sum(len(fact.prompts()) for fact in facts)
    sentences = [sentence for fact in facts for sentence in fact.statements()]
    assert len(world.fact_of_prompt()) == wordings
    assert len(set(sentences)) == len(sentences)


def test_manners_share_no_phrase():
    for ends in (world.OPENERS, world.CLOSERS):
        phrases = [phrase for known in ends.values() for phrase in known]
        assert len(set(phrases)) == len(phrases)
    openers = {phrase for known in world.OPENERS.values() for phrase in known}
    assert openers.isdisjoint(phrase for known in world.CLOSERS.values() for phrase in known)


@pytest.mark.parametrize("kind", task.KINDS)
def test_only_the_good_kind_is_gold_and_only_slips_break_the_grammar(kind: str):
    rng = random.Random(0)
    for prompt in world.fact_of_prompt():
        for _ in range(5):
            answer = task.answer_of_kind(rng, prompt, kind)
            assert task.well_formed(answer) is (kind not in ("rambling", "garbled")), answer
            assert task.gold(prompt, answer) is (kind == "good"), answer


def test_shares_add_up():
    for shares in (task.SFT_SHARES, task.REJECTED_SHARES):
        assert len(shares) == len(task.KINDS)
        assert sum(shares) == pytest.approx(1.0, abs=FIGURE)
    assert task.REJECTED_SHARES[0] == 0.0  # nothing ranks above the best kind


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_split_holds_out_one_wording_of_each_fact(seed: int):
    train, held_out = task.split_prompts(random.Random(seed))
    assert set(train).isdisjoint(held_out)
    assert {*train, *held_out} == set(world.fact_of_prompt())
    fact_of = world.fact_of_prompt()
    assert Counter((fact_of[p].topic.name, fact_of[p].subject) for p in held_out) == Counter(
        (fact.topic.name, fact.subject) for fact in world.all_facts()
    )
    # Every wording is trained on with some subject, or the held-out prompt asks the unknowable.
    trained = {(fact_of[p].topic.name, fact_of[p].prompts().index(p)) for p in train}
    assert len(trained) == sum(len(topic.questions) for topic in world.TOPICS)
    assert task.split_prompts(random.Random(seed)) == (train, held_out)
    assert task.split_prompts(random.Random(seed + 10))[1] != held_out


def test_sft_rows_are_balanced_over_prompts_and_mixed_in_quality():
    train, _ = task.split_prompts(random.Random(1))
    rows = task.sft_rows(random.Random(1), train, 10 * len(train))
    assert set(rows[0]) == {"prompt", "response"}
    assert set(Counter(row["prompt"] for row in rows).values()) == {10}
    score = task.gold_score([r["prompt"] for r in rows], [r["response"] for r in rows])
    assert score.well_formed == 1.0
    sigma = (task.SFT_SHARES[0] * (1 - task.SFT_SHARES[0]) / len(rows)) ** 0.5
    assert score.gold == pytest.approx(task.SFT_SHARES[0], abs=4 * sigma)
    assert score.gold < 0.7  # what supervised data alone can teach leaves room for PPO
    assert rows == task.sft_rows(random.Random(1), train, 10 * len(train))


def test_clean_pairs_never_reject_a_gold_answer_and_noise_swaps_the_sides():
    _, held_out = task.split_prompts(random.Random(1))
    clean = task.preference_rows(random.Random(1), held_out, 1000)
    swapped = task.preference_rows(random.Random(1), held_out, 1000, label_noise=1.0)
    assert set(clean[0]) == {"prompt", "chosen", "rejected"}
    assert not any(task.gold(row["prompt"], row["rejected"]) for row in clean)
    assert all(row["chosen"] != row["rejected"] for row in clean)
    for row, other in zip(clean, swapped, strict=True):
        assert (row["chosen"], row["rejected"]) == (other["rejected"], other["chosen"])
    assert all(task.gold(row["prompt"], row["chosen"]) for row in clean)


def test_length_does_not_tell_the_sides_apart():
    train, _ = task.split_prompts(random.Random(1))
    rows = task.preference_rows(random.Random(1), train, 4000)
    sides = [(len(row["chosen"].split()), len(row["rejected"].split())) for row in rows]
    longer = sum((c > r) + 0.5 * (c == r) for c, r in sides) / len(sides)
    assert 0.4 < longer < 0.6
    # The best rule on length alone: prefer the length that is chosen more often.
    chosen, rejected = (Counter(side[i] for side in sides) for i in (0, 1))
    worth = {n: chosen[n] / (chosen[n] + rejected[n]) for n in {*chosen, *rejected}}
    best = sum((worth[c] > worth[r]) + 0.5 * (worth[c] == worth[r]) for c, r in sides)
    assert best / len(sides) < 0.65
