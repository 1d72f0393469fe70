"""The planner's command: a recipe and hardware in, a printed plan out."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig

from dschat.config import RLHFSettings
from dschat.plan.flags import PlanFlags
from dschat.plan.memory import AnySettings, plan_memory
from dschat.plan.remedies import largest_micro_batch, remedies
from dschat.plan.report import Plan, as_json, text
from dschat.plan.roles import GIB
from dschat.plan.shapes import config_of, known_in
from dschat.plan.speed import COMPUTE, NETWORK, Cluster, plan_speed
from dschat.utils.gpus import Gpu, named_gpu


def run(args: PlanFlags, recipe: Path, settings: AnySettings) -> None:
    """Plan and print.

    Raises:
        UserError: an unknown GPU or model.
    """
    gpu, ranks = named_gpu(args.gpu), args.gpus * args.nodes
    for line in args.unused("ppo" if isinstance(settings, RLHFSettings) else "this step"):
        print(line, file=sys.stderr)
    configs = configs_of(settings, recipe, args.model, args.critic)
    efficiency = COMPUTE if args.efficiency is None else args.efficiency
    network = NETWORK if args.network is None else args.network
    cluster = Cluster(gpu, ranks, args.nodes, network, efficiency)
    memory = GIB * (gpu.memory if args.memory is None else args.memory)
    plan = make_plan(settings, configs, cluster, memory, str(recipe), args.usd_per_gpu_hour)
    print(json.dumps(as_json(plan), indent=1) if args.json else text(plan))


def make_plan(
    settings: AnySettings,
    configs: dict[str, PretrainedConfig],
    cluster: Cluster,
    memory_of_gpu: float,
    title: str,
    usd_per_gpu_hour: float | None = None,
) -> Plan:
    """Plan memory, time and remedies of a step."""
    dtype = planned_dtype(settings.run.dtype, cluster.gpu)
    planned = partial(plan_memory, configs=configs, dtype=dtype, ranks=cluster.ranks)
    memory = planned(settings)
    return Plan(
        title=title,
        unit="an iteration" if isinstance(settings, RLHFSettings) else "an optimizer step",
        dtype=dtype,
        memory=memory,
        memory_of_gpu=memory_of_gpu,
        cluster=cluster,
        parts=plan_speed(settings, memory, configs, cluster),
        remedies=remedies(settings, planned, memory_of_gpu, cluster.ranks),
        largest_micro_batch=largest_micro_batch(settings, planned, memory_of_gpu),
        usd_per_gpu_hour=usd_per_gpu_hour,
    )


def planned_dtype(name: str, gpu: Gpu) -> str:
    """Turn `auto` into what the GPU computes in."""
    if name == "auto":
        return "fp32" if gpu.bf16 is None else "bf16"
    return name


def configs_of(
    settings: AnySettings, recipe: Path, model: str | None, critic: str | None
) -> dict[str, PretrainedConfig]:
    """Configs of the models: given, or the settings' own, or those that the recipe's head names.

    A recipe of step 3 names folders that earlier steps will write.

    Raises:
        UserError: a model that is neither a folder nor well-known.
    """
    if not isinstance(settings, RLHFSettings):
        return {"model": config_of(model or settings.model_name_or_path)}
    names = settings.role_names()
    first, last = _named_in_head(recipe)
    configs = {"actor": config_of(model or _present(names.actor) or first or names.actor)}
    for role, name in (("critic", names.critic), ("reward", names.reward)):
        if name is not None:
            configs[role] = config_of(critic or _present(name) or last or name)
    return configs


def _present(name: str) -> str | None:
    return name if Path(name).expanduser().is_dir() or known_in(name) else None


def _named_in_head(recipe: Path) -> tuple[str | None, str | None]:
    """Actor and critic by the line `# model:` at the recipe's head."""
    head = re.search(r"^# model: (.*)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    named = known_in(head[1]) if head else []
    return (named[0], named[-1]) if named else (None, None)
