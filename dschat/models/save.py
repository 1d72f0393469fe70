"""Save model folders that transformers and PEFT load offline; never a half-written one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.models.causal_lm import unwrap
from dschat.models.folder_plan import plan_folder
from dschat.models.placing import PART, begin, commit, drop
from dschat.models.reward_folder import RewardForm, reward_form
from dschat.models.reward_model import RewardModel
from dschat.models.reward_note import write_note
from dschat.models.reward_statistics import FILE as STATISTICS_FILE
from dschat.models.reward_statistics import VALUE_FILE, RewardStatistics, write_statistics
from dschat.models.save_plan import ADAPTER_FOLDER, MERGED, SavePlan
from dschat.models.stream import write_weights
from dschat.utils.distributed import Distributed
from dschat.utils.files import disk_errors_named, make_folder
from dschat.utils.module.adapter_config import CAUSAL_LM, CONFIG_FILE, REWARD
from dschat.utils.module.adapter_write import (
    AdapterOrigin,
    AdapterOutline,
    outline_of,
    write_adapter,
)
from dschat.utils.predecessor import changed
from dschat.utils.waiting import from_waiting_main
from dschat.utils.zero import consolidated_state_dict


@changed("save_hf_format(model, tokenizer, output_dir, distributed, plan)", distributed=Distributed)
def save_hf_format(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    distributed: Distributed,
    plan: SavePlan = MERGED,
    statistics: RewardStatistics | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model folder: weights (adapters merged on a copy), config, tokenizer; or an adapter.

    Works for causal LMs and reward models, inside an engine of any ZeRO stage or outside; every
    rank must call it, rank 0 writes. The live model is not changed. With a plan that has an
    adapter, its folder in PEFT's format is OUTPUT_DIR/adapter, or OUTPUT_DIR itself where no merged
    weights are asked for. A reward model's `statistics` go into each folder of weights, and what a
    critic's values were scaled by.

    Args:
        files: small ones that are written beside each set of weights, by name.

    Raises:
        UserError: on every rank, where the disk does not take it; what was there stays.
    """
    module = unwrap(model)
    form = reward_form(module.config, tokenizer) if isinstance(module, RewardModel) else None
    small = _SmallFiles(module, form, form.tokenizer if form else tokenizer, statistics, files)
    target, adapter_files = _Target(Path(output_dir), distributed), list[str]()
    if plan.adapter is not None:  # first: it is small, and holds all that was trained
        own = target.inside(ADAPTER_FOLDER) if plan.merged else target
        adapter_files = _save_adapter(own, small, plan.adapter)
    if plan.merged:
        weights = plan_folder(module, form)

        def fill(part: Path) -> None:
            weights.write_config(part)
            small.write(part, None)

        with target.new_model(adapter_files) as part:
            target.by_main(functools.partial(fill, part))
            write_weights(weights, distributed.rank, functools.partial(target.write_weights, part))


def _save_adapter(target: _Target, small: _SmallFiles, origin: AdapterOrigin) -> list[str]:
    """Write an adapter's folder; return its files, on rank 0."""
    module, names = small.module, list[str]()
    outline = adapter_outline(module, origin, small.form)
    state = consolidated_state_dict(module, target.process.rank, outline.needed)

    def fill(part: Path) -> None:
        _write_adapter(module, outline, state, part)
        small.write(part, outline.config["base_model_name_or_path"])
        names.extend(path.name for path in part.iterdir())

    with target.new_model() as part:
        target.by_main(functools.partial(fill, part))
    return names


@dataclass(frozen=True)
class _SmallFiles:
    """What stands beside the weights of a model, or of an adapter on a base."""

    module: nn.Module
    form: RewardForm | None
    tokenizer: PreTrainedTokenizerBase
    statistics: RewardStatistics | None
    files: Mapping[str, bytes] | None

    def write(self, part: Path, base: str | None) -> None:
        if self.form is not None:
            write_note(self.form, part, base)
        self.tokenizer.save_pretrained(part)
        scaling = self.module.value_scaling if isinstance(self.module, RewardModel) else None
        for name, values in {STATISTICS_FILE: self.statistics, VALUE_FILE: scaling}.items():
            if values is not None:
                write_statistics(values, part, name)
        for name, content in (self.files or {}).items():
            (part / name).write_bytes(content)


@dataclass(frozen=True)
class _Target:
    """A folder that a model takes its place in; rank 0 writes, the others wait without a limit."""

    folder: Path
    process: Distributed

    def inside(self, name: str) -> _Target:
        return _Target(self.folder / name, self.process)

    @contextlib.contextmanager
    def new_model(self, adapter: Sequence[str] = ()) -> Iterator[Path]:
        """Yield where to write; after the block it takes its place, after an error nothing does."""
        try:
            self.by_main(lambda: begin(self.folder))
            yield self.folder / PART
            self.by_main(lambda: commit(self.folder, adapter))
        except Exception:
            if self.process.is_main:
                drop(self.folder)
            raise

    def by_main(self, work: Callable[[], object]) -> None:
        """Do work on rank 0; errors of the disk are one line on all ranks."""

        def run() -> str:
            if self.process.is_main:
                with self._disk_errors():
                    work()
            return ""

        from_waiting_main(run)

    def write_weights(self, part: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one file of weights.

        Raises:
            UserError: weights that are not finite; or the disk does not take them.
        """
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(
                    f"output_dir {self.folder}: {key} is not finite in the trained model; "
                    f"{self._after()}, with a lower learning rate"
                )
        with self._disk_errors(part / name):
            save_file(dict(tensors), part / name, metadata={"format": "pt"})

    def _disk_errors(self, path: str | Path = "") -> contextlib.AbstractContextManager[None]:
        return disk_errors_named(f"output_dir {self.folder}", self._after, path)

    def _after(self) -> str:
        adapter, also = self.folder / ADAPTER_FOLDER, ""
        if (adapter / CONFIG_FILE).is_file():
            also = f"; {adapter} is complete, and python -m dschat.merge merges it"
        return f"no model was written, what was there stays{also}; fix that, and start again"


def _write_adapter(
    module: nn.Module, outline: AdapterOutline, state: Mapping[str, torch.Tensor], folder: Path
) -> None:
    folder.mkdir(exist_ok=True)
    write_adapter(outline, state, folder)
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def adapter_outline(
    module: nn.Module, origin: AdapterOrigin, form: RewardForm | None
) -> AdapterOutline:
    """Map a live model's adapter to the names that its folder has."""
    if form is not None:
        return outline_of(module, origin, REWARD, form.saved_as, form.name_in_adapter)
    saved_as = type(_language_model(module))
    return outline_of(module, origin, CAUSAL_LM, saved_as, lambda name: name)


def _language_model(module: nn.Module) -> PreTrainedModel:
    if not isinstance(module, PreTrainedModel):
        raise TypeError(f"a {type(module).__name__} cannot be saved: it is no transformers model")
    return module


def check_output_dir(output_dir: str | None) -> None:
    """Stop before work starts where results could not be written."""
    if output_dir is None:
        return
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {output_dir}: is a file; give a folder")
    try:
        make_folder(path)
    except OSError as error:
        raise UserError(
            f"output_dir {output_dir}: {error.strerror}; give a writable one"
        ) from error
