"""Settings of a program that trains one model: steps 1 and 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import ClassVar

from dschat.data.batch_config import BatchConfig
from dschat.data.config import DataConfig
from dschat.settings import Settings, group, setting
from dschat.train.model_config import ModelConfig
from dschat.train.run_config import RunConfig
from dschat.train.run_length import RunLength


@dataclass(frozen=True)
class StepSettings(Settings):
    """Settings of a program that trains one model: steps 1 and 2.

    Attributes:
        KIND: name of the program. PHASE: number of the step whose rows it reads.
    """

    KIND: ClassVar[str]
    PHASE: ClassVar[int]

    model_name_or_path: str = setting(MISSING, "model folder or hub id", may_change=True)
    batch: BatchConfig = group(BatchConfig)
    eval_interval: int = setting(
        0, "optimizer steps between evaluations; 0: per epoch only", at_least=0
    )
    max_steps: int = setting(0, "stop after so many optimizer steps; 0: after the data", at_least=0)
    data: DataConfig = group(DataConfig)
    model: ModelConfig = group(ModelConfig)
    run: RunConfig = group(RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.run.engine_config(self.model, "fp32", micro_batch=1)  # it checks itself

    @property
    def trains_head_only(self) -> bool:
        """Return whether a head trains on a trunk that stays as it is."""
        return False

    def length(self, batches: Sequence[int | None]) -> RunLength:
        """Length of the run over so many micro-batches of each epoch (None: not counted)."""
        counts = [count for count in batches if count is not None]
        return RunLength(
            epochs=len(batches),
            micro_batches=min(counts) if counts else None,
            accumulation=self.run.engine.gradient_accumulation_steps,
            warm_up=self.run.warm_up,
            max_steps=self.max_steps,
        )

    def check_model(self) -> None:
        """Stop where the model cannot be trained by these settings; read its config alone."""
        from dschat.models.causal_lm import check_context

        check_context(self.model_name_or_path, self.batch.max_seq_len, "max_seq_len")
