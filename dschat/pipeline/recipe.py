"""A pipeline's file: its stages, their models, data and hardware, and how they hang together."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.cli import parse
from dschat.config.yaml_file import SHORT, as_words, read_yaml
from dschat.errors import UserError
from dschat.pipeline.pipeline_settings import PipelineSettings, local
from dschat.pipeline.stage import FOLDERS, PASSED, Stage
from dschat.settings import Settings, flag_values, flags_of, given_flags, unknown

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
KINDS: dict[str, type[Settings]] = {
    "sft": SFTSettings,
    "reward": RewardSettings,
    "dpo": DPOSettings,
    "ppo": RLHFSettings,
}
MODEL, CRITIC = "model_name_or_path", "critic_model_name_or_path"
FOLDER = "output_dir"
CONFIG = "config"  # of a stage: a file of its settings, beside the pipeline's or in RECIPES
# Of a stage: the hidden size that its rates are meant for; fit_to_rows fits them to the model.
WIDTH, CRITIC_WIDTH = "rates_of_width", "critic_rates_of_width"
EMBEDDED = "embedded"  # the model that is generated, with its data


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's settings and its stages, in their order; a line for each that does nothing."""

    settings: PipelineSettings
    stages: tuple[Stage, ...]
    unused: tuple[str, ...] = ()


def shipped() -> dict[str, Path]:
    """Map the names of the pipelines that come with the library to their files.

    A folder's name is its run.yaml, and FOLDER/8b its run_8b.yaml.
    """
    files = sorted(RECIPES.rglob("run*.yaml"), key=lambda path: (path.parent, path.stem))
    return {
        "/".join([*file.parent.relative_to(RECIPES).parts, *file.stem.split("_", 1)[1:]]): file
        for file in files
    }


def find(name: str) -> Path:
    """Find a pipeline's file: a path, or the name of one that comes with the library.

    Raises:
        UserError: there is none; with the nearest name.
    """
    if Path(name).is_file():
        return Path(name)
    known = shipped()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "dschat run --help lists those of the library"
    raise UserError(f"{name}: no such file or pipeline; {hint}")


def read(path: Path, argv: Sequence[str], description: str | None) -> Pipeline:
    """Read a pipeline's file; flags of the command line win over it.

    Raises:
        UserError: an unknown key (with the nearest), or a value that a setting cannot have.
    """
    content = read_yaml(path)
    listed = content.pop("stages", None)
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"config {path}: stages: give at least one of {', '.join(KINDS)}")
    words = as_words(f"config {path}", content, flags_of(PipelineSettings))
    settings = parse(PipelineSettings, [*words, *argv], description)
    stages: list[Stage] = []
    parsed: dict[str, Settings] = {}
    for kind, flags in listed.items():
        place = f"config {path}: stages"
        if kind not in KINDS:
            raise UserError(f"{place}: {unknown('stage', str(kind), list(KINDS))}")
        if flags is not None and not isinstance(flags, dict):
            raise UserError(f"{place}: {kind} is {SHORT.repr(flags)}: give lines of `flag: value`")
        stage, parsed[kind] = _stage(kind, flags or {}, settings, stages, path)
        stages.append(stage)
    return Pipeline(settings, tuple(stages), tuple(_unused(settings, parsed)))


def _unused(settings: PipelineSettings, stages: Mapping[str, Settings]) -> Iterator[str]:
    """Yield a line for each shared setting that a stage, or all of them, have no use for."""
    values = {kind: flag_values(parsed) for kind, parsed in stages.items()}
    given = {flag.name for flag in given_flags(settings)}
    for name in (*PASSED, "seed", "data_path", "dataset_columns"):
        for kind, own in values.items() if name in given else ():
            shared = getattr(settings, name)
            shared = tuple(map(local, shared)) if name == "data_path" else shared
            if own[name] != shared:
                its = " ".join(own[name]) if isinstance(shared, tuple) else own[name]
                yield f"--{name} does nothing in {kind}, which has its own: {its}"
    for name in ("model", "reward_model"):
        model = getattr(settings, name) or ""
        is_used = any(local(model) in own.values() for own in values.values())
        if name in given and model != EMBEDDED and not is_used:
            yield f"--{name} does nothing: no stage starts from it"
    if "hostfile" in given and settings.hardware != "multi_node":
        yield "--hostfile does nothing: it is of hardware multi_node"


def _stage(
    kind: str, given: Mapping[Any, Any], settings: PipelineSettings, before: list[Stage], path: Path
) -> tuple[Stage, Settings]:
    """Make a stage; its settings are checked, its models and data not yet."""
    place, cls = f"config {path}: stages: {kind}", KINDS[kind]
    own = {k: value for k, value in given.items() if k not in (CONFIG, WIDTH, CRITIC_WIDTH)}
    if FOLDER in own:
        raise UserError(f"{place}: {FOLDER}: the pipeline gives each stage its folder; drop it")
    words: list[str] = []
    if (config := given.get(CONFIG)) is not None:
        words += ["--config", str(_config(str(config), path, place))]
    folder = Path(settings.output_dir).resolve() / FOLDERS[kind]
    words += _inputs(kind, settings, before)
    words += [*settings.common_flags, "--output_dir", str(folder)]
    words += as_words(place, own, flags_of(cls))
    try:
        parsed = parse(cls, words, None)
    except UserError as error:
        raise UserError(f"{kind}: {error}") from error
    command = (*settings.launcher, kind, *words)
    stage = Stage(kind, kind, command, tuple(words), folder, _widths(kind, given, place))
    return stage, parsed


def _widths(kind: str, given: Mapping[Any, Any], place: str) -> dict[str, int]:
    """Read the widths that a stage's rates are meant for, by the prefix of their flags."""
    prefixes = {WIDTH: "actor_", CRITIC_WIDTH: "critic_"} if kind == "ppo" else {WIDTH: ""}
    found = {}
    for key in (WIDTH, CRITIC_WIDTH):
        if key in given:
            if key not in prefixes:
                raise UserError(f"{place}: {key} is of ppo; drop it")
            size = given[key]
            if not (isinstance(size, str) and size.isdecimal() and int(size)):
                raise UserError(f"{place}: {key} is {SHORT.repr(size)}: give a hidden size")
            found[prefixes[key]] = int(size)
    return found


def _config(name: str, path: Path, place: str) -> Path:
    for folder in (path.parent, RECIPES):
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise UserError(f"{place}: {CONFIG} {name}: no such file beside the pipeline or in {RECIPES}")


def _inputs(kind: str, settings: PipelineSettings, before: Sequence[Stage]) -> list[str]:
    """Choose models and data that the pipeline gives a stage; its own flags come after."""
    made = {stage.kind: str(stage.model) for stage in before}
    out = Path(settings.output_dir).resolve()
    first = settings.model and local(settings.model)
    words: list[str] = []
    if settings.model == EMBEDDED:
        first = str(out / "model")
        words += ["--data_path", str(out / ("sft" if kind == "sft" else "data"))]
        words += ["--data_output_path", str(out / ".data")]
    policy = made.get("dpo") or made.get("sft") or first
    if kind == "ppo":
        critic = made.get("reward") or (settings.reward_model and local(settings.reward_model))
        named = {f"actor_{MODEL}": policy, CRITIC: critic}
    elif kind == "reward":
        named = {MODEL: (settings.reward_model and local(settings.reward_model)) or policy}
    else:
        named = {MODEL: first if kind == "sft" else policy}
    return words + [word for n, model in named.items() if model for word in (f"--{n}", model)]
