"""Judges of two answers to one prompt: a reward model's scores, or a chat model's choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import nn

from dschat.data.answers import answer_rows
from dschat.data.collators import PromptCollator
from dschat.data.tokenise import Converter
from dschat.errors import UserError
from dschat.models.causal_lm import (
    check_context,
    check_model_folder,
    create_hf_model,
    forward_inputs,
)
from dschat.models.config import check_kind
from dschat.models.padding_proof import prove_padding
from dschat.models.reward_head import read_head
from dschat.models.reward_model import create_critic_model
from dschat.rlhf.candidates import GivenAnswer, own_format
from dschat.text.conversations import Example, Turn, as_turns, question
from dschat.text.encoding import encode, encode_answers
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train.answer_scores import score_answers
from dschat.utils.distributed import print_rank_0

QUESTION = """\
{prompt}

Answer A:
{a}

Answer B:
{b}

Which of these two answers to the last question is better? Reply with A or B alone."""
LETTERS = ("A", "B")

Answers = Sequence[GivenAnswer]


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of N prompts, each with a first and a second answer; all (N,) float64.

    Attributes:
        margin: how much better the first is; 0 is a tie.
        tokens: of the first and of the second answers, by the judge's tokenizer.
        orders: margins with the first answer shown first, and shown second; None where a judge
            reads one answer at a time.
    """

    margin: torch.Tensor
    tokens: tuple[torch.Tensor, torch.Tensor]
    orders: tuple[torch.Tensor, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if broken := int((~torch.isfinite(self.margin)).sum()):
            raise UserError(
                f"judge: {broken} of {len(self.margin)} verdicts are not finite; look at its "
                "weights, or give dtype fp32"
            )


class Judge(Protocol):
    """Compares two answers to each prompt."""

    @property
    def kind(self) -> str:
        """What it is, for messages."""
        ...

    def __call__(self, prompts: Sequence[Example], first: Answers, second: Answers) -> Verdicts:
        """Judge all prompts."""
        ...


@dataclass(frozen=True)
class JudgeLimits:
    """What a judge reads at most, and how it runs."""

    prompt_format: str | None
    max_seq_len: int
    batch_size: int
    dtype: torch.dtype
    device: torch.device


def check_judge(name: str, limits: JudgeLimits) -> None:
    """Refuse a judge that cannot be loaded, or has too few positions, before any model is.

    Raises:
        UserError: naming the folder and the remedy.
    """
    check_kind(name)
    tokenizer = load_hf_tokenizer(name)
    own_format(tokenizer, limits.prompt_format)
    check_model_folder(name, tokenizer)
    check_context(name, limits.max_seq_len, "max_seq_len")


def load_judge(name: str, limits: JudgeLimits) -> Judge:
    """Load a judge: one with a reward head scores answers, any other model is asked to choose."""
    tokenizer = load_hf_tokenizer(name)
    form = own_format(tokenizer, limits.prompt_format)
    convert = Converter(tokenizer, form, 3, limits.max_seq_len, None)
    scores = read_head(name) is not None
    if not scores:
        model: nn.Module = create_hf_model(name, tokenizer, limits.dtype)
    else:
        model = create_critic_model(name, tokenizer, limits.dtype)
    model.to(limits.device).eval()
    prove_padding(model, tokenizer, limits.device, name, left=not scores)
    if scores:
        return RewardJudge(model, convert, limits)
    return ChatJudge(model, convert, limits)


@dataclass(frozen=True)
class RewardJudge:
    """A reward model: the answer with the higher score is the better one."""

    model: nn.Module
    convert: Converter
    limits: JudgeLimits
    kind: str = "reward model"

    def __call__(self, prompts: Sequence[Example], first: Answers, second: Answers) -> Verdicts:
        """Compare the scores of each prompt's answers."""
        mine, my_tokens = self.scores(prompts, first)
        theirs, their_tokens = self.scores(prompts, second)
        return Verdicts(mine - theirs, (my_tokens, their_tokens))

    def scores(
        self, prompts: Sequence[Example], answers: Answers
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score each answer, and count its tokens: both (N,) float64.

        One that was cut is scored without an end token.
        """
        cut: Counter[str] = Counter()
        ended = [answer.ended for answer in answers]
        rows = answer_rows(self.convert, _answered(prompts, answers), ended, cut)
        if cut.total():
            print_rank_0(
                f"max_seq_len {self.limits.max_seq_len}: of {len(rows)} texts the judge reads "
                f"{cut['prompts_cut']} prompts and {cut['answers_cut']} answers in part"
            )
        pad, limits = self.convert.tokenizer.pad_token_id, self.limits
        scores = score_answers(self.model, rows, pad, limits.device, limits.batch_size)
        return scores, _lengths(rows)


@dataclass(frozen=True)
class ChatJudge:
    """A chat model that is shown both answers, in both orders, and asked for a letter.

    The margin is log p(A) - log p(B) of its next token, the mean over both orders: a judge that
    always takes the answer shown first, whatever it says, finds a tie.
    """

    model: nn.Module
    convert: Converter
    limits: JudgeLimits
    kind: str = "chat model"

    def __call__(self, prompts: Sequence[Example], first: Answers, second: Answers) -> Verdicts:
        """Ask about each prompt twice."""
        forward = self._margins(prompts, first, second)
        backward = -self._margins(prompts, second, first)
        sides = (answer_rows(self.convert, _answered(prompts, side)) for side in (first, second))
        tokens = tuple(_lengths(rows) for rows in sides)
        return Verdicts((forward + backward) / 2, (tokens[0], tokens[1]), (forward, backward))

    @torch.no_grad()
    def _margins(self, prompts: Sequence[Example], a: Answers, b: Answers) -> torch.Tensor:
        """log p(A) - log p(B) for each prompt, (N,)."""
        asked = [
            Example(question(QUESTION.format(prompt=_as_text(e), a=x.text, b=y.text)))
            for e, x, y in zip(prompts, a, b, strict=True)
        ]
        cut: Counter[str] = Counter()
        columns = self.convert(asked, cut)
        if cut["prompts_cut"]:
            raise UserError(
                f"max_seq_len {self.limits.max_seq_len}: {cut['prompts_cut']} of {len(asked)} "
                "questions to the judge are longer; give more, or shorter answers"
            )
        opening, letters = letter_ids(self.convert, asked[0])
        rows = [ids + opening for ids in columns["prompt_ids"]]
        margins = torch.zeros(len(asked), dtype=torch.float64)
        order = np.argsort(columns["length"], kind="stable")
        collate = PromptCollator(self.convert.tokenizer.pad_token_id)
        for start in range(0, len(rows), self.limits.batch_size):
            places = order[start : start + self.limits.batch_size].tolist()
            batch = collate([{"prompt_ids": rows[p]} for p in places]).to(self.limits.device)
            inputs = forward_inputs(self.model, batch.input_ids, batch.attention_mask)
            logits = self.model(**inputs, use_cache=False).logits[:, -1, letters].double().cpu()
            margins[places] = logits[:, 0] - logits[:, 1]
        return margins


def letter_ids(convert: Converter, asked: Example) -> tuple[list[int], list[int]]:
    """Ids that both letters begin with as answers to a question, and the first that differ.

    Raises:
        UserError: one letter's ids begin the other's.
    """
    tokenizer, form = convert.tokenizer, convert.form
    prompt = form.prompt(asked.prompt)
    ids = encode(tokenizer, [prompt], form.adds_special)
    texts = [form.answer(asked.prompt, prompt, letter) for letter in LETTERS]
    special = form.adds_special
    a, b = (encode_answers(tokenizer, [prompt], ids, [text], special)[0] for text in texts)
    shared = next(n for n, (one, other) in enumerate(zip(a, b, strict=False)) if one != other)
    if tokenizer.eos_token_id in (a[shared], b[shared]):
        raise UserError(f"judge {tokenizer.name_or_path}: its tokenizer does not tell A from B")
    return a[:shared], [a[shared], b[shared]]


def _answered(prompts: Sequence[Example], answers: Answers) -> list[Example]:
    return [replace(e, chosen=a.text, rejected=None) for e, a in zip(prompts, answers, strict=True)]


def _lengths(rows: Sequence[dict]) -> torch.Tensor:
    return torch.tensor([row["length"] - row["prompt_len"] for row in rows], dtype=torch.float64)


def _as_text(example: Example) -> str:
    """Write a conversation for a judge to read."""
    names = {"system": "System", "user": "Question", "assistant": "Answer"}
    turns: tuple[Turn, ...] = as_turns(example.prompt)
    return "\n\n".join(f"{names[turn.role]}:\n{turn.text}" for turn in turns)
