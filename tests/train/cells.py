"""What is trained for the agreement test, and on which rows; shared by the ranks and the test."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import nn

from dschat.models.reward_model import RewardModel
from dschat.train.model_config import ModelConfig
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.lora_config import LoraConfig
from dschat.utils.module.untrained_rows import TokenChoice
from dschat.utils.optim_config import OptimizerConfig
from tests.helpers.tiny import padded, tiny_gpt2, tiny_llama, tiny_moe, token_rows

BASE_RATE, RATIO, WEIGHT_DECAY = 1e-3, 16.0, 0.1
HEAD_RATE, EMBEDDING_RATE, TOKENS_RATE = 4e-3, 2e-3, 8e-3
TOKENS = (2, 40, 77, 150)  # the end token, which is only predicted, and others that are read too
RANK, ALPHA = 4, 8.0
WARM_UP, TOTAL_STEPS, STEPS = 2, 6, 4
CLIP = 1.1  # between the causal model's gradient norms: some steps are clipped, some not
ADAPTER_SEED, MODEL_SEED, HEAD_SEED = 11, 3, 5
BETAS = (0.9, 0.95)
# Adam divides by |g| + eps: with a tiny eps it would forgive any factor on the gradients, such as
# a mean over ranks taken twice. At this size a wrong factor shows.
EPS = 1e-3


@dataclass(frozen=True)
class Cell:
    """One training run: what, and how it is spread."""

    name: str
    model: str  # causal, reward, gpt2, mixtral, gpt_oss
    stage: int
    checkpointing: bool = False
    offload: bool = False
    accumulation: int = 1
    full: bool = False  # all weights, no adapters
    everything: bool = False  # the adapters' every option at once
    tokens: tuple[int, ...] = ()  # rows of embedding and head that train beside the adapters
    quantize: str | None = None
    built_from: str = "module"  # folder: from files, under ZeRO-3 in shards from the start
    dtype: str = "fp32"
    user_json: bool = False  # an optimizer block of the user's own
    first_steps: bool = False  # nothing but Adam at full rates: no warm-up, decay or clipping

    def engine_config(self, micro_batch: int, folder: str) -> EngineConfig:
        """The engine's numbers; `folder` holds the user's `adam.json`."""
        return EngineConfig(
            zero_stage=self.stage,
            dtype=self.dtype,
            offload=self.offload,
            micro_batch_size=micro_batch,
            gradient_accumulation_steps=self.accumulation,
            gradient_clipping=0.0 if self.first_steps else CLIP,
            deepspeed_config=f"{folder}/adam.json" if self.user_json else None,
        )

    def config(self) -> ModelConfig:
        """Adapters at ratio 16, or all weights."""
        rates = OptimizerConfig(
            learning_rate=BASE_RATE,
            weight_decay=0.0 if self.first_steps else WEIGHT_DECAY,
            loraplus_lr_ratio=RATIO,
            lora_embedding_learning_rate=EMBEDDING_RATE,
            trainable_tokens_learning_rate=TOKENS_RATE,
            head_learning_rate=HEAD_RATE,
            betas=BETAS,
            eps=1e-12 if self.first_steps else EPS,
        )
        return ModelConfig(
            optimizer=rates,
            lora=self.lora(),
            gradient_checkpointing=self.checkpointing,
            tokens=TokenChoice({token: "" for token in self.tokens}, always=True),
        )

    def lora(self) -> LoraConfig:
        """The adapters."""
        if self.full:
            return LoraConfig()
        options = {"quantize_base": self.quantize}
        if self.everything:
            table = "wte" if self.model == "gpt2" else "embed_tokens"
            options |= {
                "lora_init": "B",
                "use_rslora": True,
                "use_dora": True,
                "lora_module_name": ("all-linear", table),
                "modules_to_save": ("ln_f",) if self.model == "gpt2" else ("norm",),
            }
        return LoraConfig(lora_dim=RANK, lora_alpha=ALPHA, **options)


def matrix() -> list[Cell]:
    """Models by ZeRO stages, each without and (where DeepSpeed has it) with offload to the CPU."""
    return [
        Cell(f"{model}-z{stage}{'-offload' * offload}", model, stage, offload=offload)
        for model in ("causal", "reward")
        for stage in range(4)
        for offload in ((False, True) if stage > 0 else (False,))
    ]


def all_cells() -> list[Cell]:
    """The matrix, without and with gradient checkpointing; then what is tried at some stages."""
    cells = [
        replace(cell, name=cell.name + "-ckpt" * ckpt, checkpointing=ckpt)
        for cell in matrix()
        for ckpt in (False, True)
    ]
    cells += [replace(cell, name=f"{cell.name}-first", first_steps=True) for cell in matrix()]
    for stage in range(4):
        cells.append(Cell(f"causal-z{stage}-accumulation", "causal", stage, accumulation=2))
        cells.append(Cell(f"causal-z{stage}-everything", "causal", stage, everything=True))
        cells.append(Cell(f"causal-z{stage}-tokens", "causal", stage, tokens=TOKENS))
        cells.append(Cell(f"gpt2-z{stage}-tokens", "gpt2", stage, tokens=TOKENS))  # tied
    for stage in (0, 2, 3):
        cells.append(Cell(f"causal-z{stage}-json", "causal", stage, user_json=True))
        cells.append(Cell(f"causal-z{stage}-full", "causal", stage, full=True))
        cells.append(Cell(f"causal-z{stage}-bf16", "causal", stage, dtype="bf16"))
    for stage in (0, 1, 2):
        cells.append(Cell(f"causal-z{stage}-4bit", "causal", stage, quantize="4bit"))
    cells.append(Cell("reward-z2-8bit", "reward", 2, quantize="8bit", offload=True))
    for stage in (0, 3):
        cells.append(Cell(f"gpt2-z{stage}", "gpt2", stage))
        cells.append(Cell(f"gpt2-z{stage}-everything", "gpt2", stage, everything=True))
        cells.append(Cell(f"reward-z{stage}-everything", "reward", stage, everything=True))
        cells.append(Cell(f"reward-z{stage}-tokens", "reward", stage, tokens=TOKENS))
    cells.append(Cell("reward-z2-accumulation", "reward", 2, accumulation=2))
    for stage in range(4):
        cells.append(Cell(f"mixtral-z{stage}", "mixtral", stage))
        cells.append(Cell(f"mixtral-z{stage}-first", "mixtral", stage, first_steps=True))
    for stage in (2, 3):
        every = {"checkpointing": True, "offload": True, "accumulation": 2}
        cells.append(Cell(f"gpt_oss-z{stage}", "gpt_oss", stage, **every))
    cells.append(Cell("mixtral-z3-folder", "mixtral", 3, built_from="folder"))
    cells.append(Cell("causal-z3-folder", "causal", 3, built_from="folder"))
    cells.append(Cell("reward-z3-folder", "reward", 3, built_from="folder"))
    every = {"everything": True, "checkpointing": True, "offload": True, "built_from": "folder"}
    cells.append(Cell("causal-z3-folder-everything", "causal", 3, **every))
    many = {"tokens": TOKENS, "checkpointing": True, "offload": True, "built_from": "folder"}
    cells.append(Cell("causal-z3-folder-tokens", "causal", 3, **many))
    return cells


def cell_steps(cell: Cell) -> list[list[int]]:
    """The rows of each optimizer step, over all ranks and micro-batches."""
    numbers, size = row_numbers(cell), cell.accumulation
    return [list(chain(*numbers[i : i + size])) for i in range(0, len(numbers), size)]


def build_module(model: str) -> nn.Module:
    """The same weights at every call."""
    if model == "gpt2":
        return tiny_gpt2(MODEL_SEED)
    if model in ("mixtral", "gpt_oss"):
        return tiny_moe(model, MODEL_SEED)
    causal = tiny_llama(MODEL_SEED)
    if model == "causal":
        return causal
    torch.manual_seed(HEAD_SEED)
    return RewardModel(causal.model)


def row_numbers(cell: Cell) -> list[list[int]]:
    """Global micro-batches: 4 of 8 rows; with accumulation 7 of 4 rows, the last of them of 3."""
    if cell.accumulation == 1:
        return [list(range(8 * i, 8 * i + 8)) for i in range(STEPS)]
    return [list(range(4 * i, 4 * i + 4)) for i in range(6)] + [[24, 25, 26]]


def sft_batch(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and loss mask of these rows; tokens from the fourth on are trained."""
    every = token_rows(32, seed=1)
    ids, mask = padded([every[i] for i in rows])
    loss_mask = mask.clone()
    loss_mask[:, :3] = False
    return ids, mask, loss_mask


def pair_batch(rows: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and mask of chosen above rejected, and which pairs are real: copies fill up to `size`."""
    chosen, rejected = token_rows(32, seed=1), token_rows(32, seed=2)
    filled = [*rows, *[rows[0]] * (size - len(rows))]
    ids, mask = padded([chosen[i] for i in filled] + [rejected[i] for i in filled])
    return ids, mask, torch.arange(size) < len(rows)
