"""No code but the user's own runs, and no text from outside steers the terminal."""

import ast
import builtins
import logging
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from dschat.chat.bot import Chatbot
from dschat.config.cli import run_cli
from dschat.config.yaml_file import read_yaml
from dschat.data.__main__ import main as inspect_data
from dschat.data.sources import Finder
from dschat.errors import UserError
from dschat.merge import main as merge
from dschat.models import placing
from dschat.models.causal_lm import create_hf_model
from dschat.models.config import build_causal_lm, load_config
from dschat.models.reward_model import create_critic_model
from dschat.models.reward_note import NOTE_FILE, write_note
from dschat.report.html import put_in_place
from dschat.rlhf.answers import AnswerFile
from dschat.text.formats import set_format
from dschat.text.tokenizer import load_hf_tokenizer
from dschat.train import checkpoint_folder
from dschat.train.line_files import restore_lines
from dschat.utils.distributed import print_rank_0
from dschat.utils.printable import guard_terminal, printable
from inference.chatbot import main as chat
from tests.helpers.doors import (
    REFUSED,
    Payload,
    code_of,
    mark,
    plant_inert,
    planted,
    write_pickle,
)
from tests.helpers.steps import (
    DPO,
    PPO,
    PROMPT_EVALUATION,
    REWARD,
    REWARD_EVALUATION,
    SFT,
    preference_rows,
    run_worker,
    write_inputs,
    write_rows,
)

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("dschat", "training", "inference", "benchmarks", "e2e_rlhf.py", "chat.py")
SOURCES = sorted(
    path
    for name in FOLDERS
    for path in ((ROOT / name).rglob("*.py") if (ROOT / name).is_dir() else [ROOT / name])
)
LOADERS = {"from_pretrained", "from_config"}
WITHOUT_CODE = {"GenerationConfig", "RewardModel"}  # reads JSON; is this package's own
# Who may look up code by name: the user's own functions, packages that a setting asks for, and
# those of a short list that are imported late.
IMPORTERS = {"dschat/utils/user_functions.py", "dschat/train/trackers.py", "dschat/lazy.py"}
IMPORTERS |= {"dschat/train/fork_server.py"}  # modules that a pipeline names
NOT_TO_CALL = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.unsafe_load", "marshal.loads"}

WORDS = ("from_pretrained", "from_config", "torch.load", "pickle", "import_module", "exec", "yaml")
WORDS += ("marshal", " eval(", "[eval(", "(eval(")


def dotted(node: ast.expr) -> str:
    """`torch.load` for the expression; "?" for a part of any other kind."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def says(call: ast.Call, keyword: str, value: bool) -> bool:
    """Whether the call says `keyword=value`, as a constant."""
    said = {k.arg: k.value for k in call.keywords}.get(keyword)
    return isinstance(said, ast.Constant) and said.value is value


def faults_of(text: str, path: str = "") -> list[str]:
    """Ways of loading that could run code, by line."""
    if not any(word in text for word in WORDS):  # seldom: parsing all takes a second
        return []
    nodes = list(ast.walk(ast.parse(text)))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    called = {call.func for call in calls}
    found = [
        f"{node.lineno}: {dotted(node)} handed on; call it in a function"
        for node in nodes
        if isinstance(node, ast.Attribute) and is_loader(node) and node not in called
    ]
    for call in calls:
        name = dotted(call.func)
        wants = []
        if is_loader(call.func) and not says(call, "trust_remote_code", False):
            wants.append("without trust_remote_code=False")
        if name == "torch.load" and not says(call, "weights_only", True):
            wants.append("without weights_only=True")
        if name in NOT_TO_CALL or (name.endswith(".import_module") and path not in IMPORTERS):
            wants.append("looks up code")
        if any(k.arg == "allow_pickle" for k in call.keywords):
            wants.append("with allow_pickle")
        found += [f"{call.lineno}: {name} {want}" for want in wants]
    return found


def is_loader(node: ast.expr) -> bool:
    """Whether it is a function of transformers that might run code of a folder."""
    owner, _, leaf = dotted(node).rpartition(".")
    return leaf in LOADERS and owner not in WITHOUT_CODE


def test_every_call_that_loads_refuses_code():
    faults = {
        str(path.relative_to(ROOT)): found
        for path in SOURCES
        if (found := faults_of(path.read_text(), path.relative_to(ROOT).as_posix()))
    }
    assert faults == {}
    assert len(SOURCES) > 150


@pytest.mark.parametrize(
    "text",
    [
        "AutoModel.from_pretrained(name)",
        "AutoConfig.from_pretrained(name, trust_remote_code=True)",
        "cls.from_config(config, trust_remote_code=flag)",
        "build(AutoModelForCausalLM.from_config)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pickle.load(file)",
        "importlib.import_module(name)",
        "exec(text)",
    ],
)
def test_the_rule_sees(text):
    assert len(faults_of(text)) == 1


@pytest.fixture
def never_asked(monkeypatch):
    """Nobody may read from the terminal."""

    def ask(*_):
        raise AssertionError("asked")

    monkeypatch.setattr(builtins, "input", ask)


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_code_of_the_folder_is_refused(name, tmp_path, never_asked, capfd):
    plant, message = REFUSED[name]
    folder = planted(tmp_path / "model", plant)

    def load():
        tokenizer = load_hf_tokenizer(folder)
        set_format(tokenizer)
        load_config(folder)
        create_hf_model(folder, tokenizer, torch.float32)

    with pytest.raises(SystemExit) as stop:
        run_cli(load)
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert stop.value.code == 2 and message in line
    assert not mark(tmp_path / "model").exists()


def test_what_nothing_needs_stays_unread(tmp_path, never_asked):
    folder = planted(tmp_path / "model", plant_inert)
    tokenizer = load_hf_tokenizer(folder)
    model = create_hf_model(folder, tokenizer, torch.float32)
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=1, do_sample=False)
    create_critic_model(folder, tokenizer, torch.float32, init_head=True)
    build_causal_lm(load_config(folder))
    assert not mark(tmp_path / "model").exists()


def test_the_payloads_are_real(tmp_path):
    folder = planted(tmp_path / "model", plant_inert)
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert not mark(tmp_path / "model").exists()
    pickle.loads((Path(folder) / "training_args.bin").read_bytes())
    assert mark(tmp_path / "model").exists()


def programs(folder: str) -> list[list[object]]:
    """Every program that loads a model, on the folder."""
    data, few = ["--data_path", "data", "--data_output_path", "cache"], ["--samples", 0]
    short = ["--max_seq_len", 64, "--max_steps", 1, "--dtype", "fp32"]
    roles = ["--actor_model_name_or_path", folder, "--critic_model_name_or_path", folder]
    roles += ["--init_head_randomly", "--reward_function", "own:length", "--max_train_samples", 2]
    roles += ["--max_prompt_seq_len", 48, "--max_answer_seq_len", 4, "--dtype", "fp32"]
    out = ["--overwrite_output_dir", "--output_dir"]
    pair = ["--model_name_or_path_baseline", folder, "--model_name_or_path_finetune", folder]
    return [
        [SFT, "--model_name_or_path", folder, *data, *short, *out, "sft"],
        [REWARD, "--model_name_or_path", folder, *data, *short, *out, "reward"],
        [DPO, "--model_name_or_path", folder, *data, *short, *out, "dpo"],
        [REWARD_EVALUATION, "--model_name_or_path", folder, *data, "--max_seq_len", 64],
        [PROMPT_EVALUATION, *pair, "--prompts", "Hi", "--max_new_tokens", 1],
        [PPO, *roles, *data, *out, "ppo"],
        ["chat.py", "--path", folder],
        ["dschat/merge.py", folder, "merged"],
        ["dschat/data/__main__.py", "inspect", "--model_name_or_path", folder, *data, *few],
    ]


@pytest.mark.slow
def test_no_program_runs_code_of_a_folder(tmp_path):
    write_inputs(tmp_path)
    (tmp_path / "own.py").write_text("def length(prompt, answer): return len(answer) / 4\n")
    folders = {"inert": planted(tmp_path / "inert", plant_inert)}
    for number, (plant, _) in enumerate(REFUSED.values()):
        folders[str(number)] = planted(tmp_path / str(number), plant)
    plan = [argv for folder in folders.values() for argv in programs(folder)]
    results, _ = run_worker(plan, tmp_path, ranks=1)
    codes = [result.code for result in results]
    # A folder without a head, one that is no adapter.
    assert codes[:9] == [0, 0, 0, 2, 0, 0, 0, 2, 0], [r.stderr[-900:] for r in results[:9]]
    for argv, result in zip(plan[9:], results[9:], strict=True):
        assert result.code in (0, 2) and "Traceback" not in result.stderr, (argv, result)
        assert not (set("\x1b\x07\x9b\u202e") & set(result.stderr)), (argv, result.stderr)
    for folder in folders:
        assert not mark(tmp_path / folder).exists(), folder


def plant_yaml(folder: Path) -> Callable[[], object]:
    (folder / "c.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{mark(folder)}']\n")
    return lambda: read_yaml(folder / "c.yaml")


def pickled_column(folder: Path) -> pa.Table:
    """A column of an extension type of Arrow's own, which its older versions unpickled."""
    told = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    told[b"ARROW:extension:metadata"] = pickle.dumps(Payload(code_of(folder)))
    fields = [pa.field(name, pa.string(), metadata=told) for name in preference_rows(1, seed=0)[0]]
    return pa.Table.from_pylist(preference_rows(4, seed=0), pa.schema(fields))


def plant_parquet(folder: Path) -> Callable[[], object]:
    pq.write_table(pickled_column(folder), folder / "rows.parquet")
    return lambda: list(Finder().find(str(folder / "rows.parquet"))[0].read())


def plant_saved_set(folder: Path) -> Callable[[], object]:
    datasets.Dataset.from_list(preference_rows(4, seed=0)).save_to_disk(folder / "set")
    (file,) = (folder / "set").glob("*.arrow")
    table = pickled_column(folder)
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    write_pickle(folder / "set", "dataset.pkl")
    return lambda: list(Finder().find(str(folder / "set"))[0].read())


@pytest.mark.parametrize("plant", [plant_yaml, plant_parquet, plant_saved_set])
def test_no_recipe_and_no_rows_run_code(tmp_path, plant):
    folder = tmp_path / "door"
    folder.mkdir()
    read = plant(folder)
    try:
        assert len(read()) == 4  # rows, as if there were no more in them
    except UserError as error:
        assert plant is plant_yaml and "not YAML" in str(error)
    assert not mark(folder).exists() and not (tmp_path / "set-ran").exists()


def resumes_figures(out: Path) -> None:
    (out / "earlier").write_text("figures")
    restore_lines(out / "metrics.jsonl", out / "earlier")


def answers_again(out: Path) -> None:
    AnswerFile(out, None).replace(1, [])


# What writes into an output folder, the name of a file of its own there, and what that becomes.
WRITERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "figures": (resumes_figures, "metrics.tmp"),
    "answers": (answers_again, "answers.tmp"),
    "page": (lambda out: put_in_place(out / "report.html", b""), ".report.html.tmp"),
    "model": (placing.repair, placing.PART),
    "complete model": (placing.repair, placing.READY),
    "checkpoint": (checkpoint_folder.repair, "checkpoints/.step-000002.tmp"),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_in_an_output_folder_leads_nowhere(tmp_path, name, kind):
    """A stranger's run may be resumed in the folder that it came in."""
    write, link = WRITERS[name]
    mine = tmp_path / "mine"
    if kind == "folder":
        mine.mkdir()
        (mine / "notes").write_text("mine")
    else:
        mine.write_text("mine")
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    (out / link).symlink_to(mine)
    write(out)
    kept = mine / "notes" if kind == "folder" else mine
    assert kept.read_text() == "mine" and not (out / link).is_symlink()


STEERING = "a\x1b]0;title\x07\x1b[2Jb\r\x9b2J\u202ec\u2066d\x7f\u2028\udc80"
SHOWN = r"a\x1b]0;title\x07\x1b[2Jb\r\x9b2J\u202ec\u2066d\x7f\u2028\udc80"


def test_what_steers_a_terminal_is_shown_instead():
    assert printable(STEERING) == SHOWN
    for text in ("two\nlines\tand a tab", "naïve 漢字 שלום \u200f हिन्दी 👩\u200d🔬 \xa0"):
        assert printable(text) == text
    assert printable("one\nline", keep="") == r"one\nline"


def test_a_models_tokens_are_no_markup_in_its_note(tmp_path):
    steering = STEERING[:-1]  # tokens are whole characters
    word = f"`\n{steering}<script>"
    tokens = SimpleNamespace(pad_token=word, eos_token=word, eos_token_id=1)
    config = SimpleNamespace(
        get_text_config=lambda: SimpleNamespace(pad_token_id=0), model_type=steering
    )
    form = SimpleNamespace(tokenizer=tokens, config=config, has_head=False)
    write_note(form, tmp_path, base="base")
    text = (tmp_path / NOTE_FILE).read_text()
    assert text.count(rf"`'\n{SHOWN[:-6]}<script>`") == 2 and not set(text) & set(steering) - {
        *SHOWN
    }


def test_an_error_is_one_printable_line(capsys):
    def fail():
        raise UserError(f"file {STEERING}\nsecond")

    with pytest.raises(SystemExit):
        run_cli(fail)
    assert capsys.readouterr().err == f"error: file {SHOWN}\\nsecond\n"


def test_what_rank_0_prints(capsys):
    print_rank_0(f"one\n{STEERING}", 0)
    assert capsys.readouterr().out == f"one\n{SHOWN}\n"


def test_logs_warnings_and_tracebacks_of_other_libraries(capsys, monkeypatch):
    for owner, name in ((warnings, "formatwarning"), (sys, "excepthook")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    factory = logging.getLogRecordFactory()
    try:
        guard_terminal()
        record = logging.getLogger("some").makeRecord("s", 40, "f", 1, "%s", (STEERING,), None)
    finally:
        logging.setLogRecordFactory(factory)
    assert record.getMessage() == SHOWN
    assert SHOWN in warnings.formatwarning(UserWarning(STEERING), UserWarning, "f", 1, "")
    sys.excepthook(ValueError, ValueError(STEERING), None)
    assert SHOWN in capsys.readouterr().err


def test_programs_print_paths_and_rows_without_steering(tmp_path, monkeypatch, capsys):
    """The chat's first line and what a model says, a merge's error, rows in `inspect`."""
    folder = tmp_path / "mo\x1b[2Jdel"
    planted(folder, lambda _: None)
    asked = iter(["hi", "quit"])
    monkeypatch.setattr(builtins, "input", lambda _: next(asked))
    monkeypatch.setattr(Chatbot, "ask", lambda self, text, show: show(STEERING))
    chat(["--path", str(folder)])
    with pytest.raises(SystemExit):
        run_cli(lambda: merge([str(folder), str(tmp_path / "out")]))
    said = capsys.readouterr()
    assert f"Assistant:{SHOWN}\n" in said.out and r"mo\x1b[2Jdel: is no adapter" in said.err
    assert not {*said.out, *said.err} & set("\x1b\x9b\u202e")
    rows = [{**row, "chosen": f" {STEERING[:-1]}"} for row in preference_rows(8, seed=0)]
    data = write_rows(tmp_path / "r\x9bows.jsonl", rows)
    flags = ["--data_path", str(data), "--data_output_path", str(tmp_path / "cache")]
    inspect_data(["inspect", "--model_name_or_path", str(folder), *flags, "--phase", "1"])
    said = capsys.readouterr().out
    assert SHOWN[:-6] in said and r"r\x9bows.jsonl" in said
    assert not set(said) & set("\x1b\x9b\u202e\u2066\x7f\u2028\r")
