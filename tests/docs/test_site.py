"""The site: what its navigation names, links from page to page, and the reference's flags."""

import json
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs.site.links import DOCS, ELSEWHERE, NoPageError, on_site, page_of
from dschat.command.registry import COMMANDS
from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.answering import CompareSettings
from dschat.config.programs import (
    ChatSettings,
    InspectSettings,
    RewardEvaluation,
    WinRateSettings,
)
from dschat.pipeline.pipeline_settings import PipelineSettings
from dschat.plan.flags import PlanFlags
from dschat.settings import flags_of
from tests.docs.test_pages import LINK
from tests.helpers.launch import TIME_LIMIT

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "sft": SFTSettings,
    "reward": RewardSettings,
    "dpo": DPOSettings,
    "ppo": RLHFSettings,
    "run": PipelineSettings,
    "chat": ChatSettings,
    "eval": RewardEvaluation,
    "compare": CompareSettings,
    "winrate": WinRateSettings,
    "inspect": InspectSettings,
    "plan": PlanFlags,
}
WRITE = """
import sys
from docs.site import reference
reference.main()
print(*(name for name in ("torch", "transformers", "deepspeed", "mkdocs") if name in sys.modules))
"""


class Loader(yaml.SafeLoader):
    """YAML whose tags for Python stay unread."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, name, node: name)


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pages of the reference, written by a process of their own."""
    folder = tmp_path_factory.mktemp("reference")
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stdout + done.stderr
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in folder.rglob("*.md")
    }


def leaves(nav: list | dict | str) -> list[str]:
    """Pages that a navigation names, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [
        page for inner in (nav.values() if isinstance(nav, dict) else nav) for page in leaves(inner)
    ]


def own_pages() -> list[str]:
    """Pages that are files of the checkout."""
    inside = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    return [*inside, *ELSEWHERE.values()]


def test_the_navigation_names_every_page_once(config: dict, reference: dict[str, str]):
    named = leaves(config["nav"])
    assert sorted(named) == sorted([*own_pages(), *reference])
    assert named[0] == "index.md" and len(named) == len({*named})
    assert all((ROOT / source).is_file() for source in ELSEWHERE)


def test_a_broken_link_ends_the_build_and_nothing_is_loaded_from_elsewhere(config: dict):
    assert config["strict"] is True and config["theme"]["font"] is False
    assert {*config["validation"]["nav"].values(), *config["validation"]["links"].values()} == {
        "warn"
    }
    assert "offline" not in config["plugins"]  # it loads a script
    named = [*config.get("extra_javascript", []), *config["extra_css"]]
    assert all((ROOT / "docs" / name).is_file() for name in named)


@pytest.mark.parametrize(
    ("page", "text", "turned"),
    [
        (
            "index.md",
            "[a](docs/ppo.md#steps) ![b](docs/f/c.svg)",
            "[a](ppo.md#steps) ![b](f/c.svg)",
        ),
        ("index.md", "[a](https://x.org/README.md) [b](#map)", None),
        ("ppo/roles.md", "[a](../data.md) [b](rewards.md#x)", None),
        ("ppo/roles.md", "[a](../../README.md#map)", "[a](../index.md#map)"),
        ("steps/ppo.md", "[a](../../docs/ppo.md)", "[a](../ppo.md)"),
        ("steps/ppo.md", "[a](../../CHANGELOG.md)", "[a](../changelog.md)"),
        (
            "dpo.md",
            "[a](../training/step2_dpo_finetuning/README.md)",
            "[a](steps/dpo.md)",
        ),
    ],
)
def test_links_to_files_become_links_to_pages(page: str, text: str, turned: str | None):
    assert on_site(text, page) == (text if turned is None else turned)


def test_a_link_to_a_file_without_a_page_is_refused():
    with pytest.raises(NoPageError, match=r"docs/data\.md links to setup\.py, which is no page"):
        on_site("[a](../setup.py)", "data.md")


def test_every_link_of_every_page_leads_to_a_page_or_a_file_of_the_site(reference: dict[str, str]):
    sources = {page_of(path): path for path in ELSEWHERE} | {
        page: DOCS + page for page in own_pages() if page not in ELSEWHERE.values()
    }
    assert len(sources) == len(own_pages())
    texts = {
        page: on_site((ROOT / source).read_text(encoding="utf-8"), page)
        for page, source in sources.items()
    }
    texts |= reference
    for page, text in texts.items():
        for link in LINK.findall(text):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link.split("#")[0]))
            if "://" not in link and not link.startswith("#"):
                assert target in texts or (ROOT / DOCS / target).is_file(), (page, link)


def test_every_command_and_every_flag_has_its_place(reference: dict[str, str]):
    assert reference.keys() == {f"reference/{name}.md" for name in ("index", *COMMANDS)}
    for name, settings in SETTINGS.items():
        text = reference[f"reference/{name}.md"]
        for flag in flags_of(settings):
            head = f"### `--{flag.name}` {{ #{flag.name} }}\n\n"
            assert text.count(head) == 1, (name, flag.name)
            entry = text.split(head)[1].split("\n#")[0]
            assert re.sub(r"\\(.)", r"\1", entry).strip().endswith(flag.help.strip()), entry
    assert "### `--public`" in reference["reference/push.md"]
    assert "*one of `inspect`, `verify`, `convert`*" in reference["reference/checkpoint.md"]


@pytest.mark.parametrize(
    ("command", "flag", "facts"),
    [
        ("sft", "model_name_or_path", "*text · **required**"),
        ("ppo", "lam", "*number in [0, 1] · default `0.95`*"),
        ("ppo", "cliprange", "*number above 0 · default `0.2`*"),
        ("ppo", "whiten_advantages", "*one of `auto`, `always`, `never` · default `auto`*"),
        ("reward", "max_steps", "*whole number, 0 or more · default `0`*"),
        ("plan", "json", "*switch*"),
        ("winrate", "candidates", "*list: text · **required**"),
    ],
)
def test_type_default_and_bounds(reference: dict[str, str], command: str, flag: str, facts: str):
    entry = reference[f"reference/{command}.md"].split(f"{{ #{flag} }}\n\n")[1]
    assert entry.startswith(facts), entry[:200]


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr
    pages = {str(path.relative_to(tmp_path / "site")) for path in tmp_path.rglob("*.html")}
    assert {"index.html", "ppo/update.html", "reference/ppo.html", "steps/sft.html"} <= pages
    index = json.loads((tmp_path / "site/search/search_index.json").read_text(encoding="utf-8"))
    assert "reference/ppo.html#cliprange" in {entry["location"] for entry in index["docs"]}
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(
            r"<(?:link|script|img)\b[^>]*?(?:src|href)=\"?(https?:[^\">\s]+)",
            page.read_text("utf-8"),
        )
        assert loaded == [], page
