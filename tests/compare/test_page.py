"""The page of a comparison: what it shows, that it stands alone, and what its script does."""

import base64
import hashlib
import re
from pathlib import Path

import pytest

from dschat.compare import __main__ as program
from dschat.config.answering import CompareSettings
from dschat.config.cli import parse
from dschat.errors import UserError
from tests.helpers.browser import Browser, browser
from tests.helpers.candidates import PROMPTS, SHORT, make_candidates
from tests.helpers.steps import write_rows
from tests.report.test_page import EVIL, Reader
from tests.test_winrate import expected_scores


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = make_candidates(tmp_path_factory.mktemp("compare"))
    rows = [{"prompt": p, "response": f"{EVIL} {n}"} for n, p in enumerate(PROMPTS)]
    write_rows(folder / "evil.jsonl", rows)
    return folder


def compare(made: Path, *names: str, more: tuple[str, ...] = ()) -> str:
    page = made / "page.html"
    models = [str(made / name) for name in names]
    argv = [*models, "--prompts", str(made / "prompts.jsonl"), *SHORT, "--output", str(page)]
    program.main([*argv, *more])
    return page.read_text(encoding="utf-8")


def scored(made: Path) -> str:
    more = ("--reward_model", str(made / "reward"), "--max_seq_len", "96")
    return compare(made, "a.jsonl", "b.jsonl", "evil.jsonl", more=more)


def test_answers_stand_side_by_side_with_their_rewards(made):
    shown = " ".join(" ".join(Reader(scored(made)).text).split())
    mine = expected_scores(made, [f"so{n}" for n in range(6)], [n != 3 for n in range(6)]).tolist()
    theirs = expected_scores(made, [f"no, never{n}" for n in range(6)], [True] * 6).tolist()
    assert "a.jsonl against " in shown and "6 prompts of " in shown
    evil = expected_scores(made, [f"{EVIL} {n}" for n in range(6)], [True] * 6).tolist()
    ahead = mine[0] - max(theirs[0], evil[0])
    assert f"Prompt What is 0? A {made / 'a.jsonl'} so0 reward {mine[0]:.3f} {ahead:+.3f}" in shown
    assert f"B {made / 'b.jsonl'} no, never3 reward {theirs[3]:.3f}" in shown
    assert shown.count("cut by the limit") == 1
    assert f"A {made / 'a.jsonl'} {sum(mine) / 6:.3f} 1.0 83%" in shown


def test_the_page_stands_alone_and_only_its_own_script_runs(made):
    text = scored(made)
    page = Reader(text)
    assert not page.tags & {"link", "img", "iframe", "object", "embed", "form", "base"}
    assert all(target.startswith("#") for target in page.targets)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert "compare.js" not in text and "http" not in script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    policy += f"script-src 'sha256-{digest}'"
    assert policy in " ".join(text.split())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert " ".join(page.text).count(r"<script>alert(1)</script>\x1b[2J\u202e") == 6


def test_a_model_answers_by_its_seed_and_needs_no_reward(made):
    text = compare(made, "model", "a.jsonl")
    assert compare(made, "model", "a.jsonl") == text
    assert compare(made, "model", "a.jsonl", more=("--seed", "2")) != text
    assert " reward " not in " ".join(Reader(text).text)
    assert "What is 5?" in text and "What is 2?" not in compare(
        made, "model", "a.jsonl", more=("--max_prompts", "2")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["a.jsonl"], "models names 1: give 2 to 3, as in dschat compare ./sft ./ppo"),
        (["a", "b", "c", "d"], "models names 4: give 2 to 3"),
        (["a.jsonl", "b.jsonl", "./a.jsonl"], "names a.jsonl twice, also as ./a.jsonl: it would"),
        (["a", "b", "--live"], "live and prompts contradict"),
        (["a", "b", "--models", "c", "d"], "--models and a: both name models; drop one"),
        (["a.jsonl", "b.jsonl", "--output", "page.txt"], "ends with .html"),
        (["a.jsonl", "b.jsonl", "--output", "no/such/page.html"], "no folder that can be written"),
        (["a.jsonl", "reward"], "is a reward model"),
        (["a.jsonl", "b.jsonl", "--reward_model", "model"], "model: has no reward head"),
        (["a.jsonl", "b.jsonl", "--reward_mode", "x"], "did you mean --reward_model?"),
    ],
)
def test_what_cannot_be_compared_is_one_line(made, monkeypatch, change, message):
    monkeypatch.chdir(made)
    with pytest.raises(UserError) as error:
        program.main([*change, "--prompts", "prompts.jsonl", "--max_seq_len", "96", *SHORT])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_models_may_stand_anywhere(made):
    words = [["a", "b", "--prompts", "f"], ["--prompts", "f", "--greedy", "a", "b"]]
    words.append(["--prompts", "f", "--models", "a", "b"])
    assert {parse(CompareSettings, argv, None).models for argv in words} == {("a", "b")}
    with pytest.raises(UserError, match="unknown flag --sed; did you mean --seed"):
        parse(CompareSettings, ["a", "b", "--sed", "3"], None)
    with pytest.raises(UserError, match="prompts is required"):
        parse(CompareSettings, ["a", "b"], None)


def shown_prompts(window: Browser) -> list[int]:
    script = "return [...document.querySelectorAll('article:not([hidden])')].map(r => r.id)"
    return [int(name.removeprefix("p")) for name in window.call(script)]


@pytest.mark.slow
def test_filter_sort_and_a_blind_vote(made, tmp_path):
    scored(made)
    with browser(tmp_path) as window:
        window.open((made / "page.html").as_uri())
        assert shown_prompts(window) == [1, 2, 3, 4, 5, 6]
        window.type("#find", "never4")
        assert shown_prompts(window) == [5]
        choose = "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
        choose += "s.dispatchEvent(new Event('input'))"
        window.call(choose, "find", "")
        window.call(choose, "show", "cut")
        assert shown_prompts(window) == [4]
        window.call(choose, "show", "all")
        window.call(choose, "sort", "reward A")
        scores = expected_scores(made, [f"so{n}" for n in range(6)], [n != 3 for n in range(6)])
        assert shown_prompts(window) == [n + 1 for n in scores.argsort(descending=True).tolist()]
        window.call(choose, "sort", "number")

        window.click("#blind")
        visible = "return [...document.querySelectorAll('#p1 :is(.name, .figures)')]"
        visible += ".filter(e => e.checkVisibility()).length"
        assert window.call(visible) == 0
        window.click("#p1 .votes button:nth-child(2)")
        assert window.call(visible) == 6
        second = "return document.querySelector('#p1 .answer:nth-child(2)').dataset.letter"
        letter = window.call(second)
        assert f"votes: {', '.join(f'{c} {int(c == letter)}' for c in ['A', 'B', 'C', 'tie'])}" in (
            window.call("return tally.textContent")
        )
        window.call(choose, "show", "unvoted")
        assert shown_prompts(window) == [2, 3, 4, 5, 6]
        window.open((made / "page.html").as_uri())  # votes outlive a reload
        assert f"{letter} 1" in window.call("return tally.textContent")
        assert window.complaints() == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(made, tmp_path, width):
    long = [{"prompt": p, "response": "x" * 300} for p in PROMPTS]
    write_rows(made / "long.jsonl", long)
    compare(made, "a.jsonl", "long.jsonl", "evil.jsonl")
    with browser(tmp_path, width) as window:
        window.open((made / "page.html").as_uri())
        frame = "return [document.documentElement.scrollWidth, innerWidth]"
        wide, inner = window.call(frame)
        assert wide <= inner
