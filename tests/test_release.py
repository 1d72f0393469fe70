"""What is released: declared dependencies, the contents of wheel and sdist, files for GitHub."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from distutils.core import run_setup
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import dschat
from dschat.command.registry import COMMANDS
from tests.helpers.launch import TIME_LIMIT

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = [*ROOT.glob("training/step*/*.py"), *ROOT.glob("inference/*.py")]
OPTIONAL = {"gradio": "live", "bitsandbytes": "quantize"}
DISTRIBUTIONS = {"yaml": "pyyaml"}  # where the name differs from the module's
OWN = {"dschat", *(path.stem for path in PROGRAMS)}


def packages_imported() -> dict[str, str]:
    """Third-party packages that the wheel's sources import, each with a file that does."""
    found = {}
    for path in (*sorted(ROOT.glob("dschat/**/*.py")), *PROGRAMS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                found[name.split(".")[0]] = str(path.relative_to(ROOT))
    for name in sys.stdlib_module_names | OWN:
        found.pop(name, None)
    return found


def declared(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Requirement], Mapping]:
    """Requirements by name, and the extras."""
    monkeypatch.chdir(ROOT)
    setup = run_setup("setup.py", stop_after="init")
    return {r.name: r for r in map(Requirement, setup.install_requires)}, setup.extras_require


def test_every_package_that_is_imported_is_declared(monkeypatch: pytest.MonkeyPatch):
    required, extras = declared(monkeypatch)
    imported = packages_imported()
    assert {"torch", "deepspeed", "huggingface_hub"} <= imported.keys()
    for module, file in imported.items():
        if extra := OPTIONAL.get(module):
            assert module in [Requirement(line).name for line in extras[extra]], file
        else:
            assert DISTRIBUTIONS.get(module, module) in required, f"{file} imports {module}"


def test_the_tests_run_on_versions_within_the_declared_ranges(monkeypatch: pytest.MonkeyPatch):
    required, _ = declared(monkeypatch)
    for name, requirement in required.items():
        assert requirement.specifier.contains(metadata.version(name), prereleases=True), name


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_same(tmp_path: Path):
    tree = tmp_path / "tree"
    tree.mkdir()
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True, timeout=TIME_LIMIT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    copy = ["cp", "--parents", "-t", str(tree), *tracked]
    subprocess.run(copy, cwd=ROOT, check=True, timeout=TIME_LIMIT)
    wheel = built(tree, "wheel", tmp_path / "from_tree")
    sdist = built(tree, "sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    missing = [name for name in tracked if not (unpacked / name).is_file()]
    assert {*missing} <= {".gitignore"}  # so that all of it can be tested
    contents = entries(wheel)
    assert contents == entries(built(unpacked, "wheel", tmp_path / "from_sdist"))

    there = {
        str(path.relative_to(ROOT))
        for pattern in (
            "*.py",
            "py.typed",
            "*.j2",
            "*.js",
            "recipes/**/*.yaml",
            "recipes/**/*.json",
        )
        for path in ROOT.glob(f"dschat/**/{pattern}")
    }
    assert {"dschat/py.typed", "dschat/recipes/quickstart/run.yaml"} <= there
    programs = {f"dschat/programs/{command.program}" for command in COMMANDS.values()}
    there |= {name for name in programs if name.endswith(".py")}
    assert there <= contents.keys()
    about = contents.keys() - there
    assert all(".dist-info/" in name or name.startswith("dschat/programs/") for name in about)


def built(tree: Path, kind: str, target: Path) -> Path:
    """Build with the setuptools that is installed: no network."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    target.mkdir(exist_ok=True)
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, timeout=TIME_LIMIT)
    (made,) = target.glob("dschat-*.whl" if kind == "wheel" else "dschat-*.tar.gz")
    return made


def entries(wheel: Path) -> dict[str, int]:
    """Checksums of a wheel's files, without the list of them."""
    with zipfile.ZipFile(wheel) as archive:
        listed = {entry.filename: entry.CRC for entry in archive.infolist()}
    return {name: crc for name, crc in listed.items() if not name.endswith("/RECORD")}


def test_the_citation_and_the_issue_forms_can_be_read():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "message", "authors", "license"} <= citation.keys()
    assert citation["version"] == dschat.__version__
    newest = re.search(r"^## (\S+) \((\S+)\)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert newest.groups() == (dschat.__version__, str(citation["date-released"]))
    forms = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")
    }
    assert forms.keys() == {"bug", "feature", "config"}
    for name in ("bug", "feature"):
        assert {"name", "description", "body"} <= forms[name].keys()
        ids = [field["id"] for field in forms[name]["body"] if field["type"] != "markdown"]
        assert len(ids) == len({*ids})
    asked = {f["id"]: f for f in forms["bug"]["body"] if f["type"] != "markdown"}
    assert "dschat doctor" in asked["doctor"]["attributes"]["label"]
    assert asked["doctor"]["validations"]["required"]


def test_ci_runs_the_tests_the_docs_and_of_a_tag_the_release_check():
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    commands = {name: [s["run"] for s in job["steps"] if "run" in s] for name, job in jobs.items()}
    assert commands == {
        "tests": [".ci/run"],
        "docs": ["make docs"],
        "release": ["make release-check"],
    }
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in ("docs", "release-check"))
    for script in (ROOT / ".ci").iterdir():
        assert script.stat().st_mode & 0o111
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0, script
