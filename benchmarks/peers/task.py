"""What every peer trains: one model, rows in one order, batches of the same rows; and its clock.

Imports torch and transformers alone, which every peer's environment has.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

PAD, END = 0, 2
RATE, RANK = 1e-4, 16
RESULT = "RESULT "  # in front of the lines that the driver reads


@dataclass(frozen=True)
class Task:
    """One cell: sft or reward, at a vocabulary.

    Attributes:
        steps: optimizer steps that are timed, after one that is not.
        batch: sequences a step; pairs count as two.
    """

    kind: str
    vocabulary: int
    steps: int
    batch: int
    length: int

    @classmethod
    def given(cls) -> Task:
        """Read it from the command line, as the driver writes it."""
        return cls(**json.loads(sys.argv[1]))

    def config(self) -> LlamaConfig:
        """4.7 million weights beside embedding and head."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=8,
            max_position_embeddings=self.length,
            pad_token_id=PAD,
            eos_token_id=END,
        )

    def language_model(self) -> LlamaForCausalLM:
        """Make the model; the same weights in every process."""
        torch.manual_seed(0)
        return LlamaForCausalLM(self.config())

    def head(self) -> torch.Tensor:
        """(1, H) weight of a reward model's head, the same in every process."""
        return 0.02 * torch.randn(1, 256, generator=torch.Generator().manual_seed(1))

    def classifier(self) -> LlamaForSequenceClassification:
        """Make the reward model in transformers' form."""
        config = self.config()
        config.num_labels = 1
        model = LlamaForSequenceClassification(config)
        model.model.load_state_dict(self.language_model().model.state_dict())
        with torch.no_grad():
            model.score.weight.copy_(self.head())
        return model

    def sequences(self) -> Iterator[list[int]]:
        """Random ids of 60 to 100 % of the length, an end token behind each."""
        draw = torch.Generator().manual_seed(2)
        while True:
            size = int(torch.randint(self.length * 3 // 5, self.length, (1,), generator=draw))
            yield [*torch.randint(3, self.vocabulary, (size - 1,), generator=draw).tolist(), END]

    def answers(self) -> list[dict]:
        """Rows of SFT: ids, and where the answer, their last third, begins."""
        count = (self.steps + 1) * self.batch
        drawn = (next(rows) for rows in [self.sequences()] for _ in range(count))
        return [{"input_ids": ids, "start": len(ids) * 2 // 3} for ids in drawn]

    def pairs(self) -> list[dict]:
        """Pairs of a reward model."""
        rows, count = self.sequences(), (self.steps + 1) * self.batch // 2
        return [{"chosen_ids": next(rows), "rejected_ids": next(rows)} for _ in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Make one that knows the special tokens; no text is read."""
    words = {"<pad>": PAD, "<s>": 1, "</s>": END, "<unk>": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


class Clock:
    """CPU and wall seconds of the steps after the first."""

    def __init__(self, steps: int):
        self.steps, self.made, self.first_loss = steps, 0, 0.0

    def step_made(self) -> None:
        """Note the end of an optimizer step."""
        if self.made == 0:
            self.cpu, self.wall = time.process_time(), time.perf_counter()
        elif self.made == self.steps:
            self.cpu = time.process_time() - self.cpu
            self.wall = time.perf_counter() - self.wall
        self.made += 1


def serve(steps: int, train: Callable[[Clock], None]) -> None:
    """Train once for each line on stdin, and write its figures on a line."""
    torch.set_num_threads(1)
    for _ in sys.stdin:
        clock = Clock(steps)
        train(clock)
        figures = {
            "cpu": clock.cpu,
            "wall": clock.wall,
            "loss": clock.first_loss,
            "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(f"{RESULT}{json.dumps(figures)}", flush=True)
