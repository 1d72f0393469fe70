"""What a step needs on each GPU: held by its roles, and in each of its phases on top of that."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.models.attention import is_flash
from dschat.models.config import Build, build_causal_lm
from dschat.models.packing import refuse_unpackable
from dschat.models.reward_model import RewardModel
from dschat.plan import passes
from dschat.plan.passes import Pass
from dschat.plan.ppo import plan_ppo
from dschat.plan.recipe import AnySettings
from dschat.plan.roles import MemoryPlan, trained_role, training_phases


def plan_memory(
    settings: AnySettings, configs: Mapping[str, PretrainedConfig], dtype: str, ranks: int
) -> MemoryPlan:
    """Plan a step of these settings.

    Args:
        configs: of `model`, or of `actor` and, where it has them, `critic` and `reward`.
        dtype: fp32, bf16 or fp16. ranks: of the run, on all machines.

    Raises:
        UserError: packing, with a model that cannot keep sequences apart.
    """
    if isinstance(settings, RLHFSettings):
        return plan_ppo(settings, configs, dtype, ranks)
    build: Build = build_causal_lm
    if isinstance(settings, RewardSettings):
        build = RewardModel.from_config
    engine = settings.run.engine_config(
        settings.model, dtype, settings.batch.per_device_train_batch_size
    )
    model = settings.run.complete(settings.model)
    role = trained_role(configs["model"], build, model, engine, ranks)
    if isinstance(settings, SFTSettings) and settings.packing:
        refuse_unpackable(role.module, settings.model_name_or_path, settings.batch.max_seq_len)
    return MemoryPlan({"model": role}, training_phases("training", role, training_pass(settings)))


def training_pass(settings: SFTSettings | RewardSettings | DPOSettings) -> Pass:
    """The pass of a micro-batch whose rows are all of full length."""
    batch = settings.batch
    rows, length = batch.per_device_train_batch_size, batch.max_seq_len
    sequences = 1 if isinstance(settings, SFTSettings) else 2
    if batch.max_tokens_per_batch is not None:
        rows = batch.max_tokens_per_batch // (sequences * length)
    if isinstance(settings, SFTSettings):
        masked = settings.packing and not is_flash(settings.run.attn_implementation)
        return (passes.packed_pass if masked else passes.sft_pass)(rows, length)
    if isinstance(settings, RewardSettings):
        return passes.reward_pass(rows, length)
    return passes.preference_pass(rows, length)
