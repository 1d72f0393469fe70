"""A plan in one line, or the error that says what to change where the step cannot fit."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from dschat.config import RLHFSettings
from dschat.errors import UserError, brief
from dschat.models.config import load_config
from dschat.plan.memory import AnySettings, plan_memory
from dschat.plan.remedies import remedies
from dschat.plan.report import verdict
from dschat.plan.roles import MemoryPlan

FLAG = "ignore_plan"


def line_of(settings: AnySettings, dtype: str, ranks: int, memory: float) -> str:
    """One line about a step on GPUs of so many bytes.

    Raises:
        UserError: it cannot fit, with what to change first.
    """
    try:
        configs = configs_of(settings)
        plan = plan_memory(settings, configs, dtype, ranks)
    except UserError:
        raise
    except Exception as error:  # whatever a model's code does with tensors that have no values
        return f"plan: none for this model ({brief(error, with_type=True)})"
    line = f"plan: {verdict(plan, memory)}"
    if plan.total <= memory:
        return line
    if settings.run.ignore_plan:
        return f"{line}; {FLAG}: it starts all the same"
    raise UserError(f"{line}; {_first_change(settings, configs, dtype, ranks, memory)}")


def _first_change(
    settings: AnySettings,
    configs: Mapping[str, PretrainedConfig],
    dtype: str,
    ranks: int,
    memory: float,
) -> str:
    def planned(changed: AnySettings) -> MemoryPlan:
        return plan_memory(changed, configs, dtype, ranks)

    found = remedies(settings, planned, memory, ranks)
    if not found or found[-1].total > memory:
        return f"it takes more or larger GPUs, or a smaller model; --{FLAG} starts it all the same"
    changes = ", then ".join(remedy.change for remedy in found)
    return f"it fits with {changes}; --{FLAG} starts it as it is"


def configs_of(settings: AnySettings) -> dict[str, PretrainedConfig]:
    """Configs of the models that the settings name."""
    if not isinstance(settings, RLHFSettings):
        return {"model": load_config(settings.model_name_or_path)}
    names = settings.role_names()
    by_role = {"actor": names.actor, "critic": names.critic, "reward": names.reward}
    return {role: load_config(name) for role, name in by_role.items() if name is not None}
