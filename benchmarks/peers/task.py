"""What every peer trains: one model, rows in one order, batches of the same rows; and its clock.

Imports torch and transformers alone, which every peer's environment has.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

PAD, END = 0, 2
RATE, RANK = 1e-4, 16
ANSWERS, ANSWER, KL = 4, 48, 0.05  # of a prompt, tokens of each, weight of the distance
SIDES = ("chosen", "rejected")  # columns of a file of preferences
RESULT = "RESULT "  # in front of the lines that the driver reads


@dataclass(frozen=True)
class Task:
    """One cell: sft, reward, dpo, grpo, rloo or ppo, at a vocabulary.

    Attributes:
        steps: optimizer steps of a turn. turns: turns, before which a step is made untimed.
        batch: sequences a step; pairs count as two, answers to one prompt as `ANSWERS`.
        length: longest sequence, of a prompt alone where answers are sampled.
        width, layers: of the model's trunk.
        updates: steps of the policy for one batch of answers, each on its share; turns count
            batches.
        model, data: folder of a Llama, and a file of preferences, in place of random ones.
        output: folder that the trained model is written to, adapters merged, after a whole run
            (`benchmarks.peers.hh`) on data that holds ids of tokens.
        rate, schedule, warm_up: of the learning rate. flags: of this project's recipe alone.
    """

    kind: str
    vocabulary: int
    steps: int
    turns: int
    batch: int
    length: int
    width: int = 256
    layers: int = 6
    updates: int = 1
    model: str = ""
    data: str = ""
    output: str = ""
    rate: float = RATE
    schedule: str = "constant"
    warm_up: int = 0
    flags: dict[str, str] = field(default_factory=dict)

    @property
    def all_steps(self) -> int:
        """Steps that a peer makes from its start."""
        return self.steps * self.turns + 1

    @classmethod
    def given(cls) -> Task:
        """Read it from the command line, as the driver writes it."""
        return cls(**json.loads(sys.argv[1]))

    def config(self) -> LlamaConfig:
        """By default 4.7 million weights beside embedding and head."""
        if self.model:
            config = LlamaConfig.from_pretrained(
                self.model, dtype=torch.float32, trust_remote_code=False
            )
            config.pad_token_id = PAD
            return config
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.width * 43 // 16,
            num_hidden_layers=self.layers,
            num_attention_heads=8,
            max_position_embeddings=self.length + ANSWER,
            pad_token_id=PAD,
            eos_token_id=END,
        )

    def language_model(self) -> LlamaForCausalLM:
        """Make the model; the same weights in every process."""
        if self.model:
            return LlamaForCausalLM.from_pretrained(
                self.model, dtype=torch.float32, trust_remote_code=False
            )
        torch.manual_seed(0)
        return LlamaForCausalLM(self.config())

    def head(self) -> torch.Tensor:
        """(1, H) weight of a reward model's head, the same in every process."""
        return 0.02 * torch.randn(
            1, self.config().hidden_size, generator=torch.Generator().manual_seed(1)
        )

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

    def read(self, count: int) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Ids of prompt, chosen and rejected answer of so many rows; prompts lose their beginning.

        Answers longer than half of the length are left out.
        """
        lines = cycle(Path(self.data).read_text(encoding="utf-8").splitlines())
        if self.output:
            for row in map(json.loads, islice(lines, count)):
                yield tuple(row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
            return
        encode = AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)
        while count:
            row, most = json.loads(next(lines)), self.length // 2
            prompt, *sides = (encode(row[name]).input_ids for name in ("prompt", *SIDES))
            chosen, rejected = ([*ids, END] for ids in sides)
            if max(len(chosen), len(rejected)) <= most:
                yield prompt[-most:], chosen, rejected
                count -= 1

    def answers(self) -> list[dict]:
        """Rows of SFT: ids, and where the answer begins, drawn ones' last third."""
        if self.data:
            found = self.read(self.all_steps * self.batch)
            return [{"input_ids": p + chosen, "start": len(p)} for p, chosen, _ in found]
        drawn = islice(self.sequences(), self.all_steps * self.batch)
        return [{"input_ids": ids, "start": len(ids) * 2 // 3} for ids in drawn]

    def pairs(self) -> list[dict]:
        """Pairs of a reward model; drawn sides have nothing in common."""
        rows, count = self.sequences(), self.all_steps * self.batch // 2
        if self.data:
            return [
                {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
                for prompt, chosen, rejected in self.read(count)
            ]
        return [{"chosen_ids": next(rows), "rejected_ids": next(rows)} for _ in range(count)]

    def preferences(self) -> list[dict]:
        """Pairs of DPO; drawn ones have prompts of two fifths of the length."""
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        if self.data:
            found = self.read(self.all_steps * self.batch // 2)
            return [dict(zip(names, row, strict=True)) for row in found]
        cut = 2 * self.length // 5
        return [
            {"prompt_ids": pair["chosen_ids"][:cut]}
            | {side: pair[side][cut:] for side in names[1:]}
            for pair in self.pairs()
        ]

    def prompts(self, count: int) -> list[str]:
        """Texts of 60 to 100 % of the length, in words that are one token each."""
        draw = random.Random(3)
        sizes = [draw.randint(self.length * 3 // 5, self.length) for _ in range(count)]
        return [" ".join(f"w{draw.randrange(4, self.vocabulary)}" for _ in range(n)) for n in sizes]


def variety(prompt: str, answer: str) -> float:
    """Reward an answer by the share of its words that differ."""
    words = answer.split()
    return len(set(words)) / max(len(words), 1)


def tokenizer(vocabulary: int = 4) -> PreTrainedTokenizerFast:
    """Make one of the special tokens and of the words w4, w5, ..."""
    words = {"<pad>": PAD, "<s>": 1, "</s>": END, "<unk>": 3}
    words |= {f"w{number}": number for number in range(4, vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


@dataclass
class Turns:
    """Measures the steps of a peer in turns, each of which a line on stdin begins.

    Attributes:
        first_loss: of the untimed step, where its loss can be compared.
    """

    steps: int
    first_loss: float | None = None
    made: int = field(default=0, init=False)

    def step_made(self) -> None:
        """Note the end of an optimizer step; between turns, wait."""
        self.made += 1
        if (self.made - 1) % self.steps:
            return
        if self.made > 1:
            figures = {
                "cpu": time.process_time() - self._cpu,
                "wall": time.perf_counter() - self._wall,
                "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "loss": self.first_loss,
            }
            print(f"\n{RESULT}{json.dumps(figures)}", flush=True)
        if not sys.stdin.readline():
            raise SystemExit(0)
        self._cpu, self._wall = time.process_time(), time.perf_counter()
