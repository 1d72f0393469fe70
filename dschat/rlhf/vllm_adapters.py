"""The way of an actor's adapters to servers of vLLM: a folder of PEFT's for each set of weights."""

from __future__ import annotations

import functools
import hashlib
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from dschat.errors import UserError
from dschat.models.causal_lm import unwrap
from dschat.models.save import adapter_outline
from dschat.rlhf.vllm_server import VLLMServer
from dschat.utils.distributed import Distributed
from dschat.utils.files import disk_errors_named
from dschat.utils.module.adapter_write import AdapterOrigin, AdapterOutline, write_adapter
from dschat.utils.module.lora import adapted_layers
from dschat.utils.waiting import from_waiting_main
from dschat.utils.zero import consolidated_state_dict

MATRICES = (".lora_A.weight", ".lora_B.weight")  # what vLLM reads of an adapter


@dataclass
class AdapterSender:
    """Writes the actor's adapters where servers see them, and has these read them.

    Each set of weights gets a name of its own: a server keeps the keys and values of prompts by the
    adapter's name, so that those of former weights are never used again.

    Attributes:
        model: a causal LM or an engine around one. run: tells this run's folders from others'.
    """

    model: nn.Module
    origin: AdapterOrigin
    folder: Path
    servers: Sequence[VLLMServer]
    process: Distributed
    run: str
    _token: str = field(default_factory=lambda: secrets.token_hex(4))
    _number: int = 0
    _name: str = ""  # that servers have; of rank 0's choice
    _is_sent: bool = False

    def changed(self) -> None:
        """Note that the weights are others than those that servers have."""
        self._is_sent = False

    def send(self) -> str | None:
        """Send the present adapters to the servers; every rank calls it.

        Returns:
            The name to ask for; None: the actor's adapters are off, or it has none.

        Raises:
            UserError: on every rank, where a server does not take them, or the disk.
        """
        module = unwrap(self.model)
        if not any(layer.adapter_enabled for layer in adapted_layers(module)):
            return None
        if not self._is_sent:
            outline = self.outline()
            state = consolidated_state_dict(module, self.process.rank, outline.needed)
            self._name = from_waiting_main(functools.partial(self._exchange, outline, state))
            self._is_sent = True
        return self._name

    def outline(self) -> AdapterOutline:
        """Map what is written.

        Raises:
            UserError: more than LoRA's matrices trains.
        """
        outline = adapter_outline(unwrap(self.model), self.origin, None)
        others = [key for key in outline.tensors.values() if not key.endswith(MATRICES)]
        others += outline.token_rows
        if others:
            raise UserError(
                f"rollout_engine vllm: {others[0]} trains or is new, and vLLM reads matrices "
                "of LoRA alone; give actor_trainable_tokens none and a tokenizer of the "
                "base's size, or take another rollout_engine"
            )
        return outline

    def _exchange(self, outline: AdapterOutline, state: Mapping[str, torch.Tensor]) -> str:
        """Write a new adapter, have it read, and take the former one away."""
        if not self._name:  # what a killed run has left
            for left in self.folder.glob(f"{self._prefix}-*"):
                shutil.rmtree(left)
        self._number += 1
        name = f"{self._prefix}-{self._token}-{self._number}"
        place = self.folder / name
        with disk_errors_named(f"vllm_adapter_dir {self.folder}", lambda: "no adapter was sent"):
            part = self.folder / f"{name}.part"
            part.mkdir(parents=True)
            write_adapter(outline, state, part)
            part.rename(place)
        for server in self.servers:
            server.load_adapter(name, str(place.resolve()))
        if self._name:
            for server in self.servers:
                server.unload_adapter(self._name)
            shutil.rmtree(self.folder / self._name)
        return name

    @property
    def _prefix(self) -> str:
        return f"dschat-{hashlib.sha256(self.run.encode()).hexdigest()[:8]}"
