"""The model card of a finished run: README.md in each folder that holds one of its models.

A card ends with the digest of its text: one that a user has changed, or wrote, is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dschat.report.html import put_in_place
from dschat.report.panels import PANELS, Panel
from dschat.report.records import Records, read
from dschat.utils.files import regular
from dschat.utils.printable import code_span, printable

CARD, CURVE = "README.md", "training_curve.png"
ROLES = ("", "actor", "critic", "actor_ema")  # folders of models in an output folder
ADAPTER = "adapter_config.json"
TITLES = {
    "sft": "supervised fine-tuning",
    "reward": "reward model",
    "dpo": "preference optimisation",
    "ppo": "PPO",
}
CURVES = {"sft": "Loss", "reward": "Accuracy", "dpo": "Accuracy", "ppo": "Reward"}  # by program
BASES = ("model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path")
_DIGEST = re.compile(r"\n<!-- dschat: made by the run, (\w{64}) -->\n$")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Model:
    """A folder to describe: `role` is actor, critic, actor_ema or empty, `base` what it began as.

    Attributes:
        scores: it gives scores, and no text.
    """

    folder: Path
    role: str
    base: str
    is_adapter: bool
    scores: bool


def write_cards(output_dir: str | Path) -> list[Path]:
    """Write README.md, with the run's main curve, into each folder of a model that is complete.

    Returns:
        The cards that were written; one that was changed by hand is left as it is.
    """
    output_dir, written = Path(output_dir), []
    records = read(output_dir)
    curve = _curve(records)
    for model in models_of(output_dir, records):
        path = model.folder / CARD
        if path.exists() and not is_untouched(regular(path).read_text(encoding="utf-8")):
            continue
        if curve is not None:
            put_in_place(model.folder / CURVE, curve)
        put_in_place(path, card(model, records, curve is not None).encode())
        written.append(path)
    return written


def models_of(output_dir: Path, records: Records) -> Iterator[Model]:
    """Find the models in an output folder, and the adapters beside merged ones."""
    program, settings = _program(records), records.description.get("settings", {})
    for role in ROLES:
        for folder in (output_dir / role, output_dir / role / "adapter"):
            is_adapter = (folder / ADAPTER).is_file()
            weights = "adapter_model*" if is_adapter else "*.safetensors*"
            if not (is_adapter or (folder / "config.json").is_file()):
                continue
            if not any(folder.glob(weights)):
                continue
            name = BASES[2] if role == "critic" else BASES[1] if role else BASES[0]
            scores = program == "reward" or role == "critic"
            yield Model(folder, role, str(settings.get(name, "")), is_adapter, scores)


def is_untouched(text: str) -> bool:
    """Return whether a card is as a run has written it."""
    found = _DIGEST.search(text)
    return found is not None and _digest(text[: found.start()]) == found[1]


def card(model: Model, records: Records, has_curve: bool) -> str:
    """Write a card: the Hub's fields, what it is, how to load it, figures, settings."""
    text = "\n\n".join([_front(model, records), *_body(model, records, has_curve)])
    return f"{text}\n<!-- dschat: made by the run, {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _front(model: Model, records: Records) -> str:
    import yaml

    program = _program(records)
    sources = records.description.get("settings", {}).get("data_path", [])
    fields: dict[str, Any] = {
        "license": "unknown",
        "library_name": "peft" if model.is_adapter else "transformers",
        "pipeline_tag": "text-classification" if model.scores else "text-generation",
        "tags": ["dschat", program, *(["lora"] if model.is_adapter else [])],
    }
    if _is_on_hub(model.base):
        fields["base_model"] = model.base
        fields["base_model_relation"] = "adapter" if model.is_adapter else "finetune"
    if named := [name for name in sources if _is_on_hub(str(name))]:
        fields["datasets"] = named
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _is_on_hub(name: str) -> bool:
    """Return whether a name is one on the Hub, not a path of this machine."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _body(model: Model, records: Records, has_curve: bool) -> Iterator[str]:
    program, settings = _program(records), records.description.get("settings", {})
    what = "Adapter (LoRA)" if model.is_adapter else "Model"
    role = f", {model.role.replace('_', ' ')}" if model.role else ""
    yield f"# {code_span(model.folder.resolve().name)}"
    yield f"{what} of {TITLES.get(program, program)}{role}, on {code_span(_name(model.base))}."
    data = ", ".join(code_span(_name(str(name))) for name in settings.get("data_path", []))
    if data:
        yield f"**Data**: {data}."
    yield (
        "**License**: not stated. Those of the base model and of the data decide; put yours into "
        "the field `license` above."
    )
    yield "## Load it"
    yield f"```python\n{_loading(model)}\n```"
    rows = list(_figures(records))
    if rows:
        yield "## Figures"
        yield "\n".join(["| held out | first | last |", "| --- | ---: | ---: |", *rows])
    if has_curve:
        yield f"![{CURVES.get(program, 'Loss')} by step]({CURVE})"
    yield "## Settings"
    versions = records.description.get("versions", {})
    shown = {name: _shared(value) for name, value in sorted(settings.items()) if value is not None}
    text = json.dumps({"versions": versions, "settings": shown}, indent=1, ensure_ascii=True)
    yield f"<details><summary>all of them</summary>\n\n~~~json\n{text}\n~~~\n\n</details>"


def _loading(model: Model) -> str:
    if model.scores:
        return (
            "# scores of answers: dschat eval --model_name_or_path FOLDER --stdin < answers.jsonl\n"
            "from dschat.models.reward_model import create_critic_model\n"
            "from dschat.text.tokenizer import load_hf_tokenizer\n\n"
            'tokenizer = load_hf_tokenizer("FOLDER")\n'
            'model = create_critic_model("FOLDER", tokenizer)'
        )
    kind = "AutoPeftModelForCausalLM" if model.is_adapter else "AutoModelForCausalLM"
    package = "peft" if model.is_adapter else "transformers"
    return (
        "# in a terminal: dschat chat FOLDER\n"
        f"from {package} import {kind}\n"
        "from transformers import AutoTokenizer\n\n"
        f'model = {kind}.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    )


def _figures(records: Records) -> Iterator[str]:
    for name, points in sorted(records.held_out.items()):
        first, last = points[0][1], points[-1][1]
        yield f"| {_cell(name)} | {first:,.4g} | {last:,.4g} |"


def _curve(records: Records) -> bytes | None:
    title = CURVES.get(_program(records), "Loss")
    panel: Panel = next(panel for panel in PANELS if panel.title == title)
    if not any(len(train) > 1 or len(held) > 1 for _, train, held in panel.lines(records)):
        return None
    from dschat.report import drawing  # matplotlib takes a second to import

    return drawing.png(drawing.curve(panel, records))


def _program(records: Records) -> str:
    return str(records.description.get("program", ""))


def _name(path: str) -> str:
    """A name as it is; of a path its end, which says nothing about this machine."""
    return path if _is_on_hub(path) else Path(path).name or path


def _shared(value: Any) -> Any:
    """Settings as a card may state them: of paths only the last part."""
    if isinstance(value, list | tuple):
        return [_shared(item) for item in value]
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_path else value


def _cell(text: str) -> str:
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", printable(text, keep=""))
