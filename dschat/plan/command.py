"""The planner's command: a recipe and hardware in, a printed plan out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig

from dschat.config import RLHFSettings
from dschat.errors import UserError, brief
from dschat.models.causal_lm import check_positions
from dschat.plan.flags import PlanFlags
from dschat.plan.memory import AnySettings, plan_memory
from dschat.plan.remedies import largest_micro_batch, remedies
from dschat.plan.report import Plan, as_json, text
from dschat.plan.roles import GIB
from dschat.plan.shapes import config_of, known_in
from dschat.plan.speed import COMPUTE, NETWORK, Cluster, plan_speed
from dschat.utils.gpus import Gpu, named_gpu


@dataclass(frozen=True)
class Planned:
    """A step to plan: where its settings come from, and its models where these do not name them.

    Attributes:
        critic: of reward model and critic too.
    """

    title: str
    recipe: Path
    settings: AnySettings
    model: str | None = None
    critic: str | None = None


def run(args: PlanFlags, steps: Sequence[Planned]) -> None:
    """Plan all steps and print; JSON of one is an object, of several a list.

    Raises:
        UserError: an unknown GPU or model, or one whose code does not run without values.
    """
    gpu, ranks = named_gpu(args.gpu), args.gpus * args.nodes
    has_critic = any(isinstance(step.settings, RLHFSettings) for step in steps)
    for line in args.unused("ppo" if has_critic or len(steps) > 1 else "this step"):
        print(line, file=sys.stderr)
    efficiency = COMPUTE if args.efficiency is None else args.efficiency
    network = NETWORK if args.network is None else args.network
    cluster = Cluster(gpu, ranks, args.nodes, network, efficiency)
    memory = GIB * (gpu.memory if args.memory is None else args.memory)
    found = []
    for step in steps:
        configs = configs_of(step.settings, step.recipe, step.model, step.critic)
        try:
            plan = make_plan(
                step.settings, configs, cluster, memory, step.title, args.usd_per_gpu_hour
            )
        except UserError:
            raise
        except Exception as error:  # whatever a model's code does with tensors without values
            raise UserError(
                f"{step.title}: none for this model, whose code does not run on tensors without "
                f"values ({brief(error, with_type=True)}); its start on a GPU will say no more"
            ) from error
        found.append(as_json(plan))
        if not args.json:
            print("\n" * (len(found) > 1) + text(plan), flush=True)
    if args.json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=1))


def make_plan(
    settings: AnySettings,
    configs: dict[str, PretrainedConfig],
    cluster: Cluster,
    memory_of_gpu: float,
    title: str,
    usd_per_gpu_hour: float | None = None,
) -> Plan:
    """Plan memory, time and remedies of a step.

    Raises:
        UserError: its sequences are longer than a model's positions.
    """
    names = "max_prompt_seq_len and max_answer_seq_len"
    length = settings.max_seq_len if isinstance(settings, RLHFSettings) else None
    for role, config in configs.items():
        if length is None and not isinstance(settings, RLHFSettings):
            names, length = "max_seq_len", settings.batch.max_seq_len
        check_positions(config, config.name_or_path or role, length or 0, names)
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
