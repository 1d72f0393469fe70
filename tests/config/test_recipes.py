"""Recipes are complete, say what they need, are used, and are shipped with the library."""

import re
from distutils.core import run_setup
from pathlib import Path

import pytest

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.cli import parse
from dschat.config.unused import unused_flags
from dschat.settings import Settings
from dschat.train.advice import lora_advice
from dschat.train.model_config import ModelConfig
from dschat.utils.optim_config import first_lora_rate

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "dschat" / "recipes"
RECIPES = [
    str(path.relative_to(FOLDER))
    for path in sorted(FOLDER.rglob("*.yaml"))
    if not path.name.startswith("run")  # pipelines of those beside them: tests/pipeline
]
OWN_MODEL = "quickstart/"  # half a million weights: rates of its own, any hardware
STEPS = {"sft": SFTSettings, "reward": RewardSettings, "dpo": DPOSettings, "ppo": RLHFSettings}
HARDWARE = {
    "single_gpu": r"1 x \d+ GB",
    "single_node": r"8 x \d+ GB",
    "multi_node": r"\d+ nodes of 8 x \d+ GB",
}
# Hidden size by family and size; a critic of OPT's step 3 is the 350M.
WIDTHS = {
    "opt": {"350m": 1024, "1.3b": 2048, "6.7b": 4096, "13b": 5120, "30b": 7168, "66b": 9216},
    "llama2": {"7b": 4096},
    "llama3": {"8b": 4096},
    "qwen3": {"0.6b": 1024, "1.7b": 2048, "8b": 4096},
    "gemma3": {"1b": 1152, "4b": 2560},
    "smollm2": {"135m": 576, "1.7b": 2048},
}
OF_DEEPSPEED_CHAT = ("opt", "llama2", "bloom", "mgpt")  # its rates for all weights stay
# Full fine-tuning's rate and the width that it suits: of step 1 and actor, step 2, critic, DPO.
FULL_RATES = {
    "sft": (9.65e-6, 2048),
    "reward": (5e-5, 1024),
    "critic": (5e-6, 1024),
    "dpo": (5e-7, 4096),
}


def of_recipe(name: str) -> Settings:
    """What `main.py --config RECIPE` runs on."""
    cls = STEPS[re.split(r"[_.]", Path(name).name)[0]]
    return parse(cls, ["--config", str(FOLDER / name)], None)


def head(name: str) -> dict[str, str]:
    """The comment at the recipe's head: what each of its entries says."""
    comment = re.match(r"(#.*\n)+", (FOLDER / name).read_text(encoding="utf-8"))[0]
    lines = comment.replace("\n#  ", "").splitlines()
    return dict(line.removeprefix("# ").split(": ", 1) for line in lines)


def roles(name: str) -> dict[str, ModelConfig]:
    """The models that a recipe trains, by the entry of `FULL_RATES`."""
    settings, step = of_recipe(name), Path(name).name.split("_")[0]
    if isinstance(settings, RLHFSettings):
        return {"sft": settings.actor, "critic": settings.critic}
    return {step: settings.model}


def width(name: str, role: str) -> int:
    """Hidden size of a recipe's model; a critic is of its actor's size, OPT's the 350M."""
    family, _, file = name.split("/")
    size = "350m" if (family, role) == ("opt", "critic") else re.split(r"_|\.yaml", file)[1]
    return WIDTHS[family][size]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_stands_alone_and_says_what_it_needs(name: str):
    settings, said = of_recipe(name), head(name)
    assert list(unused_flags(settings)) == [
        flag for flag in unused_flags(settings) if "only_o" in flag
    ]
    if name.startswith(OWN_MODEL):
        return
    assert {"model", "hardware", "needs", "rates"} <= said.keys()
    hardware = name.split("/")[1]
    assert re.fullmatch(HARDWARE[hardware], said["hardware"]), said["hardware"]
    needs, parts = re.fullmatch(r"(\d+\.\d) GiB in [^:]+: ([^;]+)(?:;.+)?", said["needs"]).groups()
    numbers = [float(part.rpartition(" ")[2]) for part in parts.split(", ")]
    assert abs(sum(numbers) - float(needs)) <= 0.05 * (len(numbers) + 2), said["needs"]  # rounding
    assert float(needs) <= 0.9 * float(said["hardware"].split()[-2])


@pytest.mark.parametrize("name", [n for n in RECIPES if not n.startswith(OWN_MODEL)])
def test_rates_of_adapters_follow_the_rule(name: str):
    """A learns at 3 / sqrt(ratio) of what all weights would, which falls as one over the width.

    With DPO 10 in place of 3.
    """
    settings, ranks = of_recipe(name), 1 if "/single_gpu/" in name else 8
    for role, model in roles(name).items():
        rates = model.optimizer
        if model.lora.lora_dim == 0:
            continue
        rate, its_width = FULL_RATES[role]
        full = rate * its_width / width(name, role)
        if rates.lora_learning_rate is not None:  # beside a head's
            if name.split("/")[0] not in OF_DEEPSPEED_CHAT:
                assert rates.base_rate == float(f"{full:.3g}")
            full = rates.base_rate
        expected = first_lora_rate(full, rates.loraplus_lr_ratio, rates.full_to_lora)
        assert rates.lora_A_rate == float(f"{expected:.2g}")
        engine = settings.run.engine_config(model, "bf16", micro_batch=1)
        size = rates.full_rate_size
        if width(name, role) == its_width:  # whose rates are known
            assert lora_advice(model.lora, rates, engine, ranks, size) == []


def test_the_page_on_hardware_has_what_each_recipe_needs():
    lines = (ROOT / "docs/hardware.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| recipes in |"))
    table = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines[start:]]
    table = table[: table.index([])]
    (_, _, _, *prefixes), _, *rows = table
    told = {
        f"{folder}/{prefix}{model}.yaml": (hardware, needs)
        for folder, hardware, model, *figures in rows
        for prefix, needs in zip(prefixes, figures, strict=True)
        if needs
    }
    heads = {name: head(name) for name in RECIPES if not name.startswith(OWN_MODEL)}
    assert told == {
        name: (said["hardware"], said["needs"].split(" GiB")[0]) for name, said in heads.items()
    }


def test_every_recipe_is_used_by_a_script():
    scripts = "\n".join(path.read_text() for path in (ROOT / "training").rglob("*.sh"))
    assert [name for name in RECIPES if name not in scripts] == []


def test_recipes_are_packed_with_the_library():
    packed = run_setup(str(ROOT / "setup.py"), stop_after="init").package_data["dschat"]
    found = {path for pattern in packed for path in (ROOT / "dschat").glob(pattern)}
    assert {FOLDER / name for name in RECIPES} <= found
