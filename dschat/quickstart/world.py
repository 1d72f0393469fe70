"""Closed world of the embedded default: its facts, its questions, the words of its answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Topic:
    """One kind of fact: a table from subject to value, ways to ask for it and ways to state it."""

    name: str
    facts: dict[str, str]
    questions: tuple[str, ...]
    statements: tuple[str, ...]

    @property
    def values(self) -> tuple[str, ...]:
        """Values of the table, each once, in the order of first use."""
        return tuple(dict.fromkeys(self.facts.values()))

    def say(self, form: str, subject: str, value: str) -> str:
        """Say by `form` that a subject has a value, true or not."""
        text = form.format(subject=subject, value=value)
        return text[0].upper() + text[1:]


def _table(text: str) -> dict[str, str]:
    """Read `subject: value, subject: value` into a table."""
    rows = (row.split(":") for row in text.split(","))
    return {subject.strip(): value.strip() for subject, value in rows}


# No subject may have two true values in its column: a wrong answer has to be plainly wrong.
TOPICS = (
    Topic(
        "sound",
        _table(
            "a cow: moo, a dog: woof, a cat: meow, a sheep: baa, a pig: oink, a duck: quack, "
            "an owl: hoot, a bee: buzz, a lion: roar"
        ),
        (
            "What does {subject} say?",
            "What is the sound of {subject}?",
            "Tell me the sound of {subject}.",
            "Do you know what {subject} says?",
            "Which word does {subject} say?",
            "Can you tell me what {subject} says?",
        ),
        ("{subject} says {value}.",),
    ),
    Topic(
        "young",
        _table(
            "cow: a calf, dog: a puppy, cat: a kitten, sheep: a lamb, pig: a piglet, "
            "duck: a duckling, owl: an owlet, goose: a gosling, horse: a foal"
        ),
        (
            "What is a young {subject} called?",
            "What do we call a young {subject}?",
            "Tell me the name of a young {subject}.",
            "Do you know what a young {subject} is called?",
            "Which word is right for a young {subject}?",
            "Can you tell me what we call a young {subject}?",
        ),
        ("a young {subject} is called {value}.",),
    ),
    Topic(
        "legs",
        _table(
            "a cow: four, a dog: four, a duck: two, an owl: two, a bee: six, an ant: six, "
            "a spider: eight, a snake: no, a fish: no"
        ),
        (
            "How many legs does {subject} have?",
            "How many legs are on {subject}?",
            "Tell me the number of legs of {subject}.",
            "Do you know how many legs {subject} has?",
            "On how many legs does {subject} walk?",
            "Can you tell me how many legs {subject} has?",
        ),
        ("{subject} has {value} legs.",),
    ),
    Topic(
        "colour",
        _table(
            "snow: white, coal: black, grass: green, blood: red, a lemon: yellow, the sky: blue, "
            "a carrot: orange, a plum: purple, chocolate: brown"
        ),
        (
            "What colour is {subject}?",
            "What is the colour of {subject}?",
            "Tell me the colour of {subject}.",
            "Do you know the colour of {subject}?",
            "Which colour does {subject} have?",
            "Can you tell me what colour {subject} is?",
        ),
        ("the colour of {subject} is {value}.",),
    ),
    Topic(
        "capital",
        _table(
            "France: Paris, Italy: Rome, Spain: Madrid, Japan: Tokyo, Egypt: Cairo, Peru: Lima, "
            "Kenya: Nairobi, Norway: Oslo, Greece: Athens"
        ),
        (
            "What is the capital of {subject}?",
            "What is the first city of {subject}?",
            "Tell me the capital of {subject}.",
            "Do you know the capital of {subject}?",
            "Which city is the capital of {subject}?",
            "Can you tell me the capital of {subject}?",
        ),
        ("the capital of {subject} is {value}.",),
    ),
)

# One sentence each. The three manners have openers and closers of about the same lengths, so that
# neither length nor the shape of an answer tells how it behaves.
OPENERS = {
    "polite": (
        "Good question!",
        "Of course, my friend!",
        "With pleasure!",
    ),
    "plain": (
        "Let me see.",
        "Here it is.",
        "This much I know.",
    ),
    "rude": (
        "Not you again!",
        "What a silly question!",
        "How dull!",
    ),
}
CLOSERS = {
    "polite": (
        "I hope that helps.",
        "Ask me anything, my friend.",
        "You are most welcome!",
    ),
    "plain": (
        "That is all.",
        "That is how it stands.",
        "This is the answer.",
    ),
    "rude": (
        "Now go away.",
        "Leave me alone!",
        "Do not bother me again.",
    ),
}
EVASIONS = (
    "It is hard to say.",
    "Nobody can know that.",
    "That depends on many things.",
)


@dataclass(frozen=True)
class Fact:
    """One cell of one topic's table."""

    topic: Topic
    subject: str

    @property
    def value(self) -> str:
        """True value."""
        return self.topic.facts[self.subject]

    def prompts(self) -> list[str]:
        """List the prompts for this fact, one per wording, in the order of the topic."""
        return [
            f"\n\nHuman: {wording.format(subject=self.subject)}\n\nAssistant:"
            for wording in self.topic.questions
        ]

    def statements(self, value: str | None = None) -> list[str]:
        """List the sentences that give this subject `value` (default: the true one)."""
        value = self.value if value is None else value
        return [self.topic.say(form, self.subject, value) for form in self.topic.statements]


def all_facts() -> Iterator[Fact]:
    """Yield the facts of the world, topic by topic."""
    for topic in TOPICS:
        for subject in topic.facts:
            yield Fact(topic, subject)


@lru_cache(maxsize=1)
def fact_of_prompt() -> dict[str, Fact]:
    """Map each prompt of the world to its fact."""
    return {prompt: fact for fact in all_facts() for prompt in fact.prompts()}


@lru_cache(maxsize=1)
def all_statements() -> frozenset[str]:
    """Collect all sentences, true or false, that give a subject a value of the world."""
    all_values = {value for topic in TOPICS for value in topic.values}
    return frozenset(
        sentence
        for fact in all_facts()
        for value in all_values
        for sentence in fact.statements(value)
    )
