"""Command line and YAML to settings, on a small class of settings of its own."""

import gc
import itertools
import math
import os
import signal
import subprocess
import sys
from dataclasses import MISSING, dataclass

import pytest

from dschat.config import cli, yaml_file
from dschat.config.cli import check_flags, parse, run_cli
from dschat.errors import UserError
from dschat.settings import Settings, flag_values, group, setting
from dschat.train.metrics import LogConfig, MetricLogger, progress_bar
from dschat.utils.distributed import launched_rank


@dataclass(frozen=True)
class Part(Settings):
    """Flags that occur twice, under two prefixes."""

    rate: float = setting(0.5, "a rate")
    depth: int = setting(2, "a depth, like {twice}", choices=(1, 2, 3))
    share: float = setting(0.5, "a share", at_least=0, below=1)
    twice: int = 4  # no flag

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate > self.depth:
            raise UserError(f"rate is {self.rate}, above depth, which is {self.depth}: give less")


@dataclass(frozen=True)
class Example(Settings):
    """A bit of everything."""

    name: str = setting(MISSING, "a name")
    left: Part = group(Part, prefix="left_")
    right: Part = group(Part, prefix="right_", rate=0.25, twice=6)
    paths: tuple[str, ...] = setting(("a", "b"), "some paths", may_be_empty=True)
    limit: int | None = setting(None, "a limit", at_least=1)
    fast: bool = setting(False, "a switch")
    resume: str | None = setting(None, "where from", bare="newest", may_change=True)
    old: bool = setting(False, "everything is new", retired=True)
    older: int = setting(1, "nothing is counted", retired=True)


def given(*argv: str) -> Example:
    return parse(Example, ["--name", "x", *argv], "A test.")


@pytest.fixture
def config(tmp_path):
    """Write a YAML file and return the flags that name it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_defaults_and_groups():
    settings = given()
    assert settings.name == "x" and settings.paths == ("a", "b") and not settings.fast
    assert (settings.left.rate, settings.left.depth, settings.left.twice) == (0.5, 2, 4)
    assert (settings.right.rate, settings.right.depth, settings.right.twice) == (0.25, 2, 6)
    assert settings.limit is None


def test_the_command_line():
    settings = given(
        "--right_rate", "1e-5", "--left_depth=3", "--fast", "--paths", "c", "--limit", "7"
    )
    assert settings.right.rate == 1e-5 and settings.left.rate == 0.5
    assert settings.left.depth == 3 and settings.fast and settings.limit == 7
    assert settings.paths == ("c",)
    assert given("--paths").paths == ()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--left_rat", "1"], "unknown flag --left_rat; did you mean --left_rate?"),
        (["--left_rat=1"], "unknown flag --left_rat=1; did you mean --left_rate?"),
        (["--quite_another"], "unknown flag --quite_another; see --help"),
        # An unambiguous beginning is not enough: tomorrow it may be ambiguous.
        (["--lim", "3"], "unknown flag --lim; did you mean --limit?"),
        (["--limit", "three"], "argument --limit: invalid int value: 'three'"),
        (["--left_depth", "4"], "argument --left_depth: invalid choice: 4"),
        (["--limit"], "argument --limit: expected one argument"),
        (["--limit", "0"], "limit is 0: give at least 1"),
        (["stray"], "unknown flag stray"),
    ],
)
def test_what_is_wrong_on_the_command_line(argv, message):
    with pytest.raises(UserError) as error:
        given(*argv)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_required_flag_is_missed_by_name():
    with pytest.raises(UserError, match=r"^name is required$"):
        parse(Example, [], "A test.")


def test_yaml(config):
    flags = config(
        "name: from file\nleft_rate: 1e-5\nright_rate: 2\nlimit: 3\nfast: true\npaths: [c, d]\n"
    )
    settings = parse(Example, flags, "A test.")
    assert settings.name == "from file" and settings.paths == ("c", "d") and settings.fast
    assert settings.left.rate == 1e-5  # which YAML itself would read as text
    assert settings.right.rate == 2.0 and isinstance(settings.right.rate, float)
    assert settings.limit == 3


def test_the_command_line_wins_over_yaml(config):
    flags = config("name: from file\nlimit: 3\npaths: [c, d]\nleft_rate: 1.0\n")
    for argv in (["--limit", "9", "--paths", "z", *flags], [*flags, "--limit=9", "--paths", "z"]):
        settings = parse(Example, argv, "A test.")
        assert (settings.limit, settings.paths) == (9, ("z",))
        assert (settings.name, settings.left.rate) == ("from file", 1.0)


def test_yaml_null_and_false_are_the_defaults(config):
    settings = parse(Example, config("name: x\nlimit: null\nfast: false\n"), "A test.")
    assert settings.limit is None and settings.fast is False


def test_yaml_values_may_look_like_flags(config):
    assert parse(Example, config("name: --dash\n"), "A test.").name == "--dash"
    assert parse(Example, config("name: x\nleft_rate: -1\n"), "A test.").left.rate == -1.0


@pytest.mark.parametrize(
    "word", ["2024_01_05", "1.10", "010", "2:4:4", "1:30.5", "0x1F", "2024-01-05", "1_000", ".inf"]
)
def test_values_mean_what_the_same_words_mean_on_the_command_line(config, word):
    assert parse(Example, config(f"name: {word}\npaths: [{word}]\n"), "A test.") == parse(
        Example, ["--name", word, "--paths", word], "A test."
    )
    try:
        limit = parse(Example, ["--name=x", f"--limit={word}"], "A test.").limit
    except UserError:
        limit = None
    if limit is None:
        with pytest.raises(UserError, match="argument --limit: invalid int value"):
            parse(Example, config(f"name: x\nlimit: {word}\n"), "A test.")
    else:
        assert parse(Example, config(f"name: x\nlimit: {word}\n"), "A test.").limit == limit


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: x\nlimmit: 3\n", "unknown key limmit; did you mean limit?"),
        ("name: x\nrate: 3\n", "unknown key rate; did you mean "),
        ("name: x\nlimit: three\n", "argument --limit: invalid int value: 'three'"),
        ("name: x\nleft_depth: 9\n", "argument --left_depth: invalid choice: 9"),
        ("name: x\nlimit: [1, 2]\n", "limit is [1, 2], expected one value"),
        ("name: {a: 1}\n", "name is {'a': 1}, expected one value"),
        ("name: x\nlimit: true\n", "limit is True, expected one value"),
        ("name: x\nlimit: false\n", "limit is False, expected one value"),
        ("name: x\nfast: 3\n", "fast is 3, expected true or false"),
        ("name: x\nfast: 'yes'\n", "fast is 'yes', expected true or false"),
        ("name: x\npaths: [on, off]\n", "paths is [True, False], expected a list of single values"),
        ("name: x\npaths: {a: 1}\n", "paths is {'a': 1}, expected values"),
        ("- name\n", "expected lines of `flag: value`"),
    ],
)
def test_what_is_wrong_in_yaml(config, text, message):
    flags = config(text)
    with pytest.raises(UserError) as error:
        parse(Example, flags, "A test.")
    assert str(error.value).startswith(f"config {flags[1]}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, line, message",
    [
        (b"name: x\nlimit: [1\n", 3, "not YAML (expected ',' or ']', but got '<stream end>')"),
        (b"name: x\n\tlimit: 3\n", 2, "not YAML (found character '\\t' that cannot start any to"),
        (b"name: x\nlimit: 3\nname: y\n", 3, "not YAML (the key name stands twice)"),
        (b"? [a, b]\n: 3\n", 1, "not YAML (a key is a list or a mapping, not a word)"),
        (b"{a: b}: 3\n", 1, "not YAML (a key is a list or a mapping, not a word)"),
        (b"limit: 3\nname: caf\xe9\n", 2, "not UTF-8; save it as UTF-8"),
    ],
)
def test_what_is_no_yaml_names_its_line(tmp_path, content, line, message):
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        parse(Example, ["--config", str(file)], "A test.")
    assert str(error.value).startswith(f"config {file} line {line}: {message}")
    assert "\n" not in str(error.value)


def test_a_value_without_end_is_said_in_short(tmp_path):
    """Ten lists of ten lists of …, each written once; and a list in a list in a …"""
    names = "abcdefghi"
    lines = [f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]" for a, b in itertools.pairwise(names)]
    file = tmp_path / "settings.yaml"
    file.write_text("\n".join(["paths: &a {x: 1}", "limit:", *(f"  {x}" for x in lines)]) + "\n")
    with pytest.raises(UserError, match=r"paths is {'x': 1}, expected values"):
        parse(Example, ["--config", str(file)], "A test.")
    file.write_text(file.read_text().replace("&a {x: 1}", "&a [x]"))
    with pytest.raises(UserError, match=r"limit is .*, expected one value") as error:
        parse(Example, ["--config", str(file)], "A test.")
    assert len(str(error.value)) < 1000
    file.write_text("limit: " + "[" * 50_000)
    with pytest.raises(UserError, match=r"settings.yaml: nested too deeply"):
        parse(Example, ["--config", str(file)], "A test.")


@pytest.mark.parametrize(
    "text, message",
    [
        ("paths: [[a, b]]", r"paths is \[\['a', 'b'\]\], expected a list of single values"),
        ("paths:\n- &a [x]\n- {y: *a}", r"expected a list of single values"),
        (f"limit: {'9' * 5000}", r"yaml line 1: not YAML \(a number of 5,000 characters\)"),
        ("limit: 2001-99-99", r"settings.yaml: argument --limit: invalid int value: '2001-99-99'"),
        ("#" * 1_000_001, r"settings.yaml: takes more than 1,000,000 bytes to read; write"),
        ("MERGED", r"settings.yaml: takes more than 0.2 s to read; write it in short"),
    ],
)
def test_what_grows_beyond_bounds_is_one_line(tmp_path, monkeypatch, text, message):
    """Lists of lists as words; mappings that are merged ten times into ten others, and so on."""
    if text == "MERGED":
        monkeypatch.setattr(yaml_file, "SECONDS", 0.2)
        pairs = itertools.pairwise("abcdefghijkl")
        lines = [f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 10)}]}}" for a, b in pairs]
        text = "\n".join(["a: &a {x: 1, y: 2}", *lines])
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        parse(Example, ["--config", str(file)], "A test.")
    assert len(str(error.value)) < 300


def test_a_stray_word_does_not_join_a_list_of_the_file(config):
    with pytest.raises(UserError, match="unknown flag stray"):
        parse(Example, ["stray", *config("name: x\npaths: [a]\n")], "A test.")


def test_a_config_file_that_is_not_there(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(UserError, match=f"config {path}: No such file"):
        parse(Example, ["--config", str(path)], "A test.")


def test_retired_flags_say_so_once(config, capsys):
    given("--old", "--old", "--older", "5")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "--old does nothing: everything is new",
        "--older does nothing: nothing is counted",
    ]
    given()
    assert capsys.readouterr().out == ""
    parse(Example, config("name: x\nold: true\n"), "A test.")
    assert capsys.readouterr().out == "--old does nothing: everything is new\n"


def test_retired_flags_say_so_on_the_first_rank_alone(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    given("--old")
    assert capsys.readouterr().out == ""


def test_help_shows_defaults_of_each_group(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Example, ["--help"], "A test.")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A test." in text
    assert "--left_rate X a rate (default: 0.5)" in text
    assert "--right_rate X a rate (default: 0.25)" in text
    assert "a depth, like 6 (default: 2)" in text


def test_run_cli_turns_a_user_error_into_one_line(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["main.py", "--name", "x", "--limit", "0"])
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: parse(Example, None, "A test."))
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert (out, err) == ("", "error: limit is 0: give at least 1\n")


def test_another_rank_leaves_an_error_to_the_first_and_then_says_it(capsys, monkeypatch):
    """The first one meets it too, and the launcher ends this one; or it is this one's alone."""
    monkeypatch.setenv("RANK", "1")
    said = []
    monkeypatch.setattr(cli.time, "sleep", lambda _: said.append(capsys.readouterr().err))

    def fail():
        raise UserError("no")

    with pytest.raises(SystemExit) as end:
        run_cli(fail)
    assert end.value.code == 2 and said == [""]
    assert capsys.readouterr().err == "error: rank 1: no\n"


def test_a_rank_that_is_no_number_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(SystemExit) as end:
        run_cli(launched_rank)
    assert end.value.code == 2
    line = "error: RANK is 'x' in the environment: set a number, or unset it\n"
    assert capsys.readouterr().err == line


def test_an_error_stands_on_a_line_of_its_own(capsys):
    bar = progress_bar(3, "ppo", MetricLogger(LogConfig(), None, rank=0))

    def fail():
        raise UserError("no such thing")

    with pytest.raises(SystemExit):
        run_cli(fail)
    bar.close()
    assert "error: no such thing" in capsys.readouterr().err.splitlines()


def test_run_cli_hides_no_other_error():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 / 0)
    run_cli(lambda: None)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"limit": 0}, "limit is 0: give at least 1"),
        ({"limit": 1.5}, "limit is 1.5: give a whole number"),
        ({"left_rate": math.nan}, "left_rate is nan: give a finite number"),
        ({"left_rate": math.inf}, "left_rate is inf: give a finite number"),
        ({"left_rate": True}, "left_rate is True: give a finite number"),
        ({"right_share": 1.0}, "right_share is 1.0: give a number in [0, 1)"),
        ({"right_share": -math.inf}, "right_share is -inf: give a number in [0, 1)"),
        ({"left_depth": 4}, "left_depth is 4: choose one of 1, 2, 3"),
        # A check of two settings names the flag of the group that it failed in.
        ({"right_rate": 3.0}, "right_rate is 3.0, above depth, which is 2: give less"),
        ({"paths": "abc"}, "paths is 'abc': give a list of values"),
        ({"left_rat": 1.0}, "unknown setting left_rat; did you mean left_rate?"),
    ],
)
def test_what_is_wrong_from_python(flags, message):
    with pytest.raises(UserError) as error:
        Example.of(name="x", **flags)
    assert str(error.value) == message


def test_settings_are_made_without_a_command_line():
    assert Example("x") == Example.of(name="x") == given()
    made = Example("x", left=Part(depth=3), paths=["c"])
    assert made == given("--left_depth", "3", "--paths", "c")
    assert made.right.twice == 6
    with pytest.raises(UserError, match=r"^share is 2: give a number in \[0, 1\)$"):
        Part(share=2)


def test_values_by_flag_leave_retired_ones_out():
    values = flag_values(Example("x", fast=True))
    assert values["fast"] is True and values["right_rate"] == 0.25
    assert "old" not in values and "left_twice" not in values


def test_a_flag_without_its_value():
    assert given("--resume").resume == "newest" and given("--resume", "a").resume == "a"


def test_output_that_nobody_reads_is_one_line():
    """As of `dschat inspect ... | head`."""
    program = "from dschat.config.cli import run_cli; run_cli(lambda: print('x' * 10**6))"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 1
    line = "error: rank 0, before the first step: nobody reads its standard output any more; write"
    assert said.startswith(line) and said.count("\n") == 1


def test_garbage_is_looked_for_again_once_the_program_runs():
    seen: list[bool] = []
    try:
        check_flags(Example, "A test.", ["--name", "x"])
        seen.append(gc.isenabled())
        run_cli(lambda: seen.append(gc.isenabled()))
        assert seen == [False, True] and gc.get_freeze_count() > 0
    finally:
        gc.enable()
        gc.unfreeze()


def test_ctrl_c_is_one_line_wherever_it_comes():
    """Imports, which take seconds, are a program's own too; a shell calls the code 130."""
    program = "from dschat.config.cli import run_cli; import os, signal\n"
    program += "run_cli(lambda: os.kill(os.getpid(), signal.SIGINT))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")


def test_ctrl_c_ends_an_import_that_would_swallow_it(tmp_path):
    (tmp_path / "swallows.py").write_text(
        "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException: pass\n"
    )
    program = "from dschat.config.cli import run_cli; run_cli(lambda: __import__('swallows'))"
    path = os.pathsep.join((str(tmp_path), *sys.path))
    command = [sys.executable, "-c", program]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")


def test_garbage_is_looked_for_where_the_flags_are_wrong():
    with pytest.raises(SystemExit):
        check_flags(Example, "A test.", ["--nam", "x"])
    assert gc.isenabled()
