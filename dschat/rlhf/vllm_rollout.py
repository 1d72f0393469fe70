"""A rollout engine that asks servers of vLLM, which run apart from the trainer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from dschat.data.batches import PromptBatch
from dschat.errors import UserError
from dschat.rlhf.generation import Sampled, SamplingConfig
from dschat.rlhf.vllm_adapters import AdapterSender
from dschat.rlhf.vllm_server import VLLMServer
from dschat.utils.distributed import on_every_rank
from dschat.utils.waiting import from_waiting_main

CONNECTIONS = 128  # open at a time, of each rank; a server batches what they ask
Answer = tuple[list[int], list[float]]  # ids and their log-probabilities
# A server fills in what is missing from the model's generation_config.json.
PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
PLAIN |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass
class VLLMRollout:
    """Samples by servers that hold the base, and read the actor's adapters from a folder.

    Ids go there and come back, so that no text is tokenised. One request stands for all answers to
    a prompt, with a seed of torch's generator. Each rank asks one server for its own prompts.

    Attributes:
        sleeps: servers give their memory back between rollouts.
    """

    refills: ClassVar[bool] = True

    adapters: AdapterSender
    tokenizer: PreTrainedTokenizerBase
    sleeps: bool = False
    _under_way: Callable[[], object] = field(default=lambda: None, repr=False)  # waits for it

    def __post_init__(self) -> None:
        servers = self.adapters.servers
        self.server: VLLMServer = servers[self.adapters.process.rank % len(servers)]
        self.base, self.longest = self.server.model()

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig) -> Sampled:
        """See `RolloutEngine`."""
        sampled = on_every_rank(self.start(prompts, sampling))
        if self.sleeps:
            self._by_main(VLLMServer.sleep)
        return sampled

    def start(self, prompts: PromptBatch, sampling: SamplingConfig) -> Callable[[], Sampled]:
        """See `RunsApart`; what is under way ends first, whose adapter would be taken away."""
        on_every_rank(self._under_way)
        if self.sleeps:
            self._by_main(VLLMServer.wake_up)
        model = self.adapters.send() or self.base
        rows = self._rows_of_prompts(prompts)
        answers = _Background(
            [
                partial(self.server.complete, self._request(ids, len(of), sampling, model))
                for ids, of in rows.items()
            ]
        )
        self._under_way = answers.wait
        return lambda: self._sampled(prompts, zip(rows.values(), answers.wait(), strict=True))

    def next_logits(self, prompts: PromptBatch) -> None:
        """See `RolloutEngine`; a server tells no logits."""

    def weights_changed(self) -> None:
        """See `RolloutEngine`."""
        self.adapters.changed()

    def _by_main(self, call: Callable[[VLLMServer], None]) -> None:
        def on_all() -> str:
            for server in self.adapters.servers:
                call(server)
            return ""

        from_waiting_main(on_all)

    @staticmethod
    def _rows_of_prompts(prompts: PromptBatch) -> dict[tuple[int, ...], list[int]]:
        """Map each prompt's ids, without padding, to its rows."""
        rows: dict[tuple[int, ...], list[int]] = {}
        columns = zip(prompts.input_ids.cpu(), prompts.attention_mask.cpu(), strict=True)
        for row, (ids, mask) in enumerate(columns):
            rows.setdefault(tuple(ids[mask].tolist()), []).append(row)
        return rows

    def _request(
        self, ids: tuple[int, ...], answers: int, config: SamplingConfig, model: str
    ) -> dict[str, Any]:
        if config.top_k or config.top_p < 1:
            raise UserError(
                "rollout_engine vllm samples from the whole distribution: drop top_p and top_k"
            )
        return PLAIN | {
            "model": model,
            "prompt": list(ids),
            "n": 1 if config.greedy else answers,  # the likeliest answer is the same each time
            "seed": int(torch.randint(2**31, ()).item()),
            "temperature": 0.0 if config.greedy else config.temperature,
            "max_tokens": config.max_answer_seq_len,
            "min_tokens": config.min_answer_seq_len,
            # Answers end with this token alone, whatever other ends the model's folder names.
            "ignore_eos": True,
            "stop_token_ids": [self.tokenizer.eos_token_id],
            "stop": list(config.stop_strings),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "logprobs": 0,  # of the sampled tokens alone
            "return_token_ids": True,
        }

    def _sampled(
        self, prompts: PromptBatch, found: Iterator[tuple[list[int], list[Answer]]]
    ) -> Sampled:
        """Put the answers after their prompts, padded after their ends."""
        by_row: dict[int, Answer] = {}
        for rows, answers in found:
            by_row |= {row: answers[i % len(answers)] for i, row in enumerate(rows)}
        longest = max(len(ids) for ids, _ in by_row.values())
        tokens = torch.full((len(by_row), longest), self.tokenizer.pad_token_id)
        logprobs = torch.zeros(len(by_row), longest)
        for row, (ids, of_ids) in by_row.items():
            tokens[row, : len(ids)] = torch.tensor(ids)
            logprobs[row, : len(of_ids)] = torch.tensor(of_ids)
        device = prompts.input_ids.device
        sequences = torch.cat([prompts.input_ids, tokens.to(device)], dim=1)
        return Sampled(sequences, logprobs.to(device))


class _Background:
    """Calls in threads that do not outlive the process; results in the calls' order."""

    def __init__(self, calls: list[Callable[[], list[Answer]]]):
        self._results: list[list[Answer] | None] = [None] * len(calls)
        self._waiting = iter(enumerate(calls))
        self._turn, self._error = threading.Lock(), list[BaseException]()
        threads = min(CONNECTIONS, len(calls))
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while not self._error:
            with self._turn:
                place, call = next(self._waiting, (0, None))
            if call is None:
                return
            try:
                self._results[place] = call()
            except BaseException as error:
                self._error.append(error)

    def wait(self) -> list[list[Answer]]:
        """Return the results once all are there.

        Raises:
            UserError: what one of the calls met.
        """
        for thread in self._threads:
            thread.join()
        if self._error:
            raise self._error[0]
        return [result for result in self._results if result is not None]
