"""Settings of rollouts by servers of vLLM, which run apart from the trainer."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.errors import UserError
from dschat.rlhf.vllm_server import KEY
from dschat.settings import Settings, given_flags, setting
from dschat.utils.addresses import check_address


@dataclass(frozen=True)
class VLLMConfig(Settings):
    """Servers that sample answers, and how the actor's adapters reach them."""

    vllm_url: tuple[str, ...] = setting(
        (),
        "servers of rollout_engine vllm, such as http://node7:8000; rank r asks the r-th, in turn",
        may_change=True,
    )
    vllm_adapter_dir: str | None = setting(
        None,
        "folder that the servers see under this name too; adapters are written there (default: "
        "vllm_adapters in output_dir)",
        may_change=True,
    )
    vllm_timeout: float = setting(
        600.0, "seconds to wait for one answer of a server", above=0, may_change=True
    )
    vllm_sleep: bool = setting(
        False,
        "servers on the trainer's own GPUs: they give their memory back between rollouts (sleep "
        "level 1)",
        may_change=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for url in self.vllm_url:
            check_address("vllm_url", url, "http://node7:8000", KEY)

    def check(self, engine: str) -> None:
        """Refuse servers that the rollout engine does not ask, or an engine without one.

        Raises:
            UserError: naming the setting.
        """
        if engine == "vllm" and not self.vllm_url:
            raise UserError(
                "rollout_engine vllm: no server is named; give vllm_url http://HOST:PORT"
            )
        given = [flag.name for flag in given_flags(self)]
        if engine != "vllm" and given:
            raise UserError(
                f"{given[0]} does nothing with rollout_engine {engine}: give rollout_engine vllm, "
                f"or drop {given[0]}"
            )
