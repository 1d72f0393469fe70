"""Reward models with a tokenizer of their own: sampled ids → text → ids of its training.

Step 2 encodes the prompt alone, then the answer as its continuation, which ends in one end token.
The same happens here to sampled sequences, so that a score is the one that `rw_eval.py` gives to
the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.text.chat_template import render
from dschat.text.conversations import Turn
from dschat.text.encoding import decode, encode, encode_answers, tokenizer_fingerprint, truncate
from dschat.text.formats import PromptFormat, choose_format
from dschat.text.ordinary import SpecialNames, as_ordinary, special_ids

CONVERSATION = (Turn("user", "One?"), Turn("assistant", "Two."), Turn("user", "Three?"))
WITH_SYSTEM = (Turn("system", "Zero."), *CONVERSATION)


@dataclass(frozen=True)
class Retokeniser:
    """Encodes sequences of one tokenizer as another model reads them; build with `between`.

    Attributes:
        around: text of the reader's chat template, which the prompt is put into, before an answer
            and between it and its end; None: prompt and answer are read as they stand.
        longest: tokens of prompt and answer that the reader takes; None: any number.
    """

    source: PreTrainedTokenizerBase
    reader: PreTrainedTokenizerBase
    around: tuple[str, str] | None = None
    longest: int | None = None

    @classmethod
    def between(
        cls,
        source: PreTrainedTokenizerBase,
        reader: PreTrainedTokenizerBase,
        name: str,
        longest: int | None,
    ) -> Retokeniser | None:
        """Make a retokeniser from `source` to `reader`; None where they are the same.

        Args:
            name: the reading model's, for messages.

        Raises:
            UserError: its prompt format cannot be made from text of the source's.
        """
        ours, theirs = choose_format(source).name, choose_format(reader).name
        if ours == theirs == "chat" and not _same_template(source, reader):
            raise UserError(
                f"{name}: its chat template is not that of {source.name_or_path}, and a prompt "
                "cannot be read back out of a template; train both with one template, or with "
                "prompt_format dschat"
            )
        if ours != theirs and not (ours == "dschat" and theirs == "chat"):
            raise UserError(
                f"{name}: trained with the prompt format {theirs!r}, but {source.name_or_path} "
                f"with {ours!r}, and a prompt cannot be read back out of that; train both with one "
                "prompt_format"
            )
        if ours == theirs and tokenizer_fingerprint(source) == tokenizer_fingerprint(reader):
            return None
        around = None if ours == theirs else _around_answers(choose_format(reader))
        return cls(source, reader, around, longest)

    def __call__(
        self, sequences: torch.Tensor, attention_mask: torch.Tensor, answer_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode the same texts in the reader's tokens.

        Args:
            sequences: (B, P + A) of the source's ids, the last A columns the answers.
            attention_mask: of the same shape, bool.

        Returns:
            (B, T) ids padded on the right, and the bool mask of what is not padding.
        """
        texts, ended = [], []
        for ids, mask in zip(sequences.cpu(), attention_mask.cpu(), strict=True):
            answer = ids[-answer_length:][mask[-answer_length:]].tolist()
            texts.append(self._text(ids[:-answer_length][mask[:-answer_length]].tolist(), answer))
            ended.append(self.source.eos_token_id in answer)
        rows = [torch.tensor(row, dtype=torch.long) for row in self._encoded(texts, ended)]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.reader.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
        return ids.to(sequences.device), mask.to(sequences.device)

    def _text(self, prompt: list[int], answer: list[int]) -> tuple[str, str]:
        """Decode prompt and answer; mark what are names of the reader's special tokens in letters.

        Tokens that the source's tokenizer puts before every text are dropped, and special tokens
        inside an answer, the end token among them.
        """
        form, special = choose_format(self.source), special_ids(self.source)
        start = encode(self.source, [""])[0] if form.adds_special else []
        if prompt[: len(start)] == start:
            prompt = prompt[len(start) :]
        answer = [i for i in answer if i not in special]
        opened, joint = decode(self.source, prompt), decode(self.source, prompt + answer)
        # After its prompt, since tokenizers drop the space that a text of its own begins with.
        is_joined = joint.startswith(opened)
        text = joint[len(opened) :] if is_joined else decode(self.source, answer)
        return self._marked(prompt, opened, special), as_ordinary(self.reader, text)

    def _marked(self, ids: list[int], text: str, special: set[int]) -> str:
        """Mark the reader's names in a decoded text, save those of the source's special tokens."""
        names = SpecialNames(self.reader)
        if not names.pattern.search(text):
            return text
        pieces, end = [], 0
        for at in (at for at, token in enumerate(ids) if token in special):
            start, stop = (len(decode(self.source, ids[:until])) for until in (at, at + 1))
            pieces += [names.mark(text[end:start]), text[start:stop]]
            end = stop
        return "".join([*pieces, names.mark(text[end:])])

    def _encoded(self, texts: list[tuple[str, str]], ended: list[bool]) -> list[list[int]]:
        """Encode as step 2 does; an answer that did not end has no end token."""
        form = choose_format(self.reader)
        prompts, answers = [opened for opened, _ in texts], [answer for _, answer in texts]
        if self.around is not None:
            before, after = self.around
            prompts = [form.prompt(text) for text in prompts]
            answers = [
                f"{before}{answer.strip()}{after if has_end else ''}"
                for answer, has_end in zip(answers, ended, strict=True)
            ]
        heads = encode(self.reader, prompts, form.adds_special)
        tails = encode_answers(self.reader, prompts, heads, answers, form.adds_special)
        rows = []
        for head, tail, has_end in zip(heads, tails, ended, strict=True):
            tail = tail if has_end else tail[:-1]
            if self.longest is not None and len(head) + len(tail) > self.longest:
                short = truncate(head, [tail], self.longest, self.reader.bos_token_id)
                head, tail = short.prompt, short.answers[0]
            rows.append(head + tail)
        return rows


def _same_template(source: PreTrainedTokenizerBase, reader: PreTrainedTokenizerBase) -> bool:
    """Return whether both write a conversation in the same characters, end tokens included."""
    if source.eos_token != reader.eos_token:
        return False
    for turns in (CONVERSATION, WITH_SYSTEM):
        written: list[str | None] = []
        for tokenizer in (source, reader):
            try:
                written.append(render(tokenizer, turns, True))
            except UserError:  # templates may refuse system turns
                written.append(None)
        if written[0] != written[1]:
            return False
    return True


def _around_answers(form: PromptFormat) -> tuple[str, str]:
    """Text that a chat template writes before an answer, and between it and its end."""
    question = CONVERSATION[:1]
    prompt = form.prompt(question)
    before, _, after = form.answer(question, prompt, "Answer").partition("Answer")
    return before, after
