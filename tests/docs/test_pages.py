"""The pages name what is there: the README's map, links, the numbers behind figures."""

import csv
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.faults.report import table
from tests.test_layering import FLOORS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path for place in ("*.md", "docs/**/*.md", "training/*/*.md") for path in ROOT.glob(place)
)
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for place in (
        "*.py",
        "dschat/**/*.py",
        "training/**/*.py",
        "inference/*.py",
        "benchmarks/**/*.py",
    )
    for path in sorted(ROOT.glob(place))
)
WORDS = set(re.findall(r"\w+", SOURCES.replace("-", "_")))
LAUNCHERS = {  # and their flags
    *("nproc_per_node", "nnodes", "rdzv_endpoint"),
    *("num_gpus", "include", "master_port", "hostfile", "module"),
    *("max_restarts", "signals_to_handle", "standalone"),
    *("nodes", "gpus", "time", "ntasks", "requeue", "open_mode", "signal"),
    *("ntasks_per_node", "gpus_per_node", "nodelist", "rdzv_backend", "launcher"),
    *("kill_on_bad_exit", "gpu_bind", "host", "no_ssh_check", "master_addr", "launcher_args"),
}
SERVERS = {  # flags of vLLM's
    *("enable_lora", "max_lora_rank", "max_loras", "max_model_len", "logprobs_mode", "api_key"),
    "lora_modules",
    *("enable_sleep_mode", "gpu_memory_utilization", "data_parallel_size"),
    "distributed_executor_backend",
}
EVALUATORS = {"apply_chat_template", "model_args", "tasks"}  # flags of lm_eval
LINK = re.compile(r"\]\(([^)\s]+)\)")


def tracked() -> set[str]:
    """Paths of the checkout under version control."""
    if not (ROOT / ".git").exists():  # an unpacked sdist, be it in a checkout's build folder
        pytest.skip("not a git checkout")
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return {path for path in listing.splitlines() if (ROOT / path).exists()}


def map_entries(text: str) -> set[str]:
    """Paths that the README's map names: entries of the checkout and, indented, of dschat/."""
    block = re.search(r"## Map\n\n```\n(.*?)```", text, re.DOTALL)[1]
    entries = set()
    for line in block.splitlines():
        folder = "dschat/" if line.startswith(" ") else ""
        *names, _purpose = re.split(r"\s{2,}", line.strip())
        entries |= {folder + name.rstrip("/") for name in names}
    return entries


def anchors_of(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def test_the_map_names_every_entry_of_the_checkout_and_of_the_library_and_nothing_else():
    paths = [path for path in tracked() if not path.startswith(".")]
    top = {path.split("/")[0] for path in paths}
    inside = {"/".join(path.split("/")[:2]) for path in paths if path.startswith("dschat/")}
    there = top | inside - {"dschat/__init__.py", "dschat/py.typed"}
    assert map_entries((ROOT / "README.md").read_text(encoding="utf-8")) == there


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path):
    text = page.read_text(encoding="utf-8")
    for flag in re.findall(r"(?<![\w-])--([a-z][\w-]+\w)", text):
        name = flag.replace("-", "_")
        names = {name, name.removeprefix("actor_"), name.removeprefix("critic_")}
        assert names & (WORDS | LAUNCHERS | SERVERS | EVALUATORS), flag
    for path in re.findall(r"`((?:dschat|tests|training|benchmarks|inference)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"\b([A-Z]\w+(?:Config|Settings|Setup|Plan))\(", text):
        assert f"class {name}(" in SOURCES or f"class {name}:" in SOURCES, name


def test_every_promise_of_reliability_names_tests_that_exist():
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (`tests/[^|]+) \|$", text, re.M)
    assert len(rows) > 10
    for promise, tests in rows:
        for path, _, name in (test.partition("::") for test in re.findall(r"`([^`]+)`", tests)):
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"^def {name or 'test_'}", source, re.M), f"{promise}: {path} {name}"


@pytest.mark.parametrize("name", ["faults", "faults_two_ranks"])
def test_the_table_of_faults_is_that_of_the_run(name: str):
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    counts = json.loads((ROOT / f"docs/figures/{name}.json").read_text(encoding="utf-8"))
    assert table(counts) in text


def test_every_page_is_reached_from_the_readme():
    reached, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = LINK.findall(page.read_text(encoding="utf-8"))
        queue += [
            (page.parent / link.split("#")[0]).resolve() for link in links if "://" not in link
        ]
    assert set(PAGES) - reached == set()


def test_the_picture_of_the_architecture_has_every_room_on_its_floor():
    drawn: dict[str, float] = {}
    svg = (ROOT / "docs/figures/architecture.svg").read_text(encoding="utf-8")
    for y, name in re.findall(r'<text x="[\d.]+" y="([\d.]+)"[^>]*bold">(\w+)</text>', svg):
        drawn.setdefault(name, float(y))
    heights = [{drawn[room] for room in floor} for floor in FLOORS]
    assert all(len(height) == 1 for height in heights)  # rooms of one floor stand side by side
    from_the_ground_up = [height.pop() for height in heights]
    assert from_the_ground_up == sorted(from_the_ground_up, reverse=True)


def rows_of(name: str) -> list[list[str]]:
    """Rows of docs/figures/NAME.csv."""
    with (ROOT / f"docs/figures/{name}.csv").open(encoding="utf-8") as file:
        return list(csv.reader(file))


def test_the_figures_show_the_numbers_that_the_page_tells():
    text = (ROOT / "docs/ppo/measured.md").read_text(encoding="utf-8")
    lines = text[text.index("| iteration | ppo, 1 epoch") :].split("\n\n")[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows_of("stories_rewards") == [table[0], *table[2:]]
    (_, *states), *seeds = rows_of("quickstart_gold")
    for state, *shares in zip(states, *(shares for _, *shares in seeds), strict=True):
        assert f"| {state} | {', '.join(shares)} |" in text
