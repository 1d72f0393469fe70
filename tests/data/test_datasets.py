from collections import Counter

import pytest

from dschat.data import datasets as data_utils
from dschat.data.report import PHASE_NAMES
from dschat.data.tokenise import Converter
from dschat.errors import UserError
from dschat.text.conversations import Example
from dschat.text.encoding import Truncated, truncate, truncate_left
from dschat.text.formats import choose_format, set_format
from tests.data.spec import Spec

BOS, EOS = 1, 2
ROWS = [{"prompt": f"hi {n}", "chosen": f" we {n}", "rejected": f" {n}"} for n in range(10)]


@pytest.fixture(autouse=True)
def raw(byte_tokenizer, space_tokenizer):
    """Texts as they stand, so that lengths can be counted by hand."""
    for tokenizer in (byte_tokenizer, space_tokenizer):
        set_format(tokenizer, "raw")


@pytest.fixture
def spec(write_rows, tmp_path):
    write_rows(ROWS, "set/train.jsonl")
    write_rows(ROWS[:3], "set/test.jsonl")
    out = str(tmp_path / "out")
    return Spec(
        data_path=(str(tmp_path / "set"),),
        data_split="2,4,4",
        data_output_path=out,
        max_seq_len=64,
        max_prompt_len=8,
    )


def _texts(rows, column, tokenizer):
    return sorted(tokenizer.decode(ids) for ids in rows[column])


def _folders(spec):
    root = data_utils.Path(spec.config.data_output_path) / "sets"
    return sorted(root.iterdir()) if root.is_dir() else []


def test_rows_fit_as_they_are():
    cut = truncate([BOS, 5, 6], [[7, EOS], [8, 9, EOS]], 6, BOS)
    assert cut == Truncated([BOS, 5, 6], [[7, EOS], [8, 9, EOS]], False, 0)


def test_long_prompt_gives_way_on_the_left_alike_for_both_sides():
    # 6 + 3 > 8: the longer answer leaves 5 places, BOS and the last four.
    cut = truncate([BOS, 4, 5, 6, 7, 8], [[9, EOS], [9, 9, EOS]], 8, BOS)
    assert cut == Truncated([BOS, 5, 6, 7, 8], [[9, EOS], [9, 9, EOS]], True, 0)
    cut = truncate([3, 4, 5, 6, 7, 8], [[9, 9, EOS]], 8, None)
    assert cut.prompt == [4, 5, 6, 7, 8]


def test_long_answer_is_cut_on_the_right_and_keeps_its_end():
    # The prompt leaves 8 - 2 = 6 places, more than half of 8.
    cut = truncate([BOS, 3], [[4, 5, 6, 7, 8, 9, EOS], [4, EOS]], 8, BOS)
    assert cut == Truncated([BOS, 3], [[4, 5, 6, 7, 8, EOS], [4, EOS]], False, 1)


def test_both_long_share_the_length():
    # 9 places: the answer gets max(9 - 7, 4) = 4, the prompt the other 5.
    cut = truncate([BOS, 3, 4, 5, 6, 7, 8], [[10, 11, 12, 13, 14, EOS]], 9, BOS)
    assert cut == Truncated([BOS, 5, 6, 7, 8], [[10, 11, 12, EOS]], True, 1)


def test_cut_left():
    assert truncate_left([BOS, 3, 4], 3, BOS) == [BOS, 3, 4]
    assert truncate_left([BOS, 3, 4], 2, BOS) == [BOS, 4]
    assert truncate_left([BOS, 3, 4], 1, BOS) == [BOS]
    assert truncate_left([7, 3, 4], 1, BOS) == [4]
    assert truncate_left([BOS, 3, 4], 0, BOS) == []


def test_phases_share_out_the_train_rows_and_not_the_test_rows(spec, byte_tokenizer):
    sft, pairs, prompts = (spec.make(byte_tokenizer, p) for p in (1, 2, 3))
    assert [len(data.train) for data in (sft, pairs, prompts)] == [2, 4, 4]
    assert [len(data.eval) for data in (sft, pairs, prompts)] == [3, 3, 3]
    trained = (
        _texts(sft.train, "input_ids", byte_tokenizer)
        + _texts(pairs.train, "chosen_ids", byte_tokenizer)
        + [
            f"{text} we {text.split()[1]}<eos>"
            for text in _texts(prompts.train, "prompt_ids", byte_tokenizer)
        ]
    )
    assert sorted(trained) == [f"{row['prompt']}{row['chosen']}<eos>" for row in ROWS]


def test_columns_of_each_phase(spec, space_tokenizer):
    row = spec.but(data_split="1").make(space_tokenizer, 1).eval[0]
    prompt = space_tokenizer("hi 0")["input_ids"]
    assert row["prompt_len"] == len(prompt) and row["input_ids"][: len(prompt)] == prompt
    assert row["input_ids"][-1] == EOS and row["length"] == len(row["input_ids"])
    row = spec.make(space_tokenizer, 2).eval[0]
    assert row["chosen_ids"][: len(prompt)] == row["rejected_ids"][: len(prompt)] == prompt
    assert row["length"] == max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    row = spec.make(space_tokenizer, 3).eval[0]
    assert row == {"prompt_ids": prompt, "length": len(prompt), "columns": None}


def test_sft_only_sources_go_wholly_to_phase_one(spec, write_rows, byte_tokenizer):
    extra = write_rows([{"prompt": "a", "response": f" {n}"} for n in range(20)], "extra.jsonl")
    spec = spec.but(sft_only_data_path=(extra,))
    sft = spec.make(byte_tokenizer, 1)
    assert (len(sft.train), len(sft.eval)) == (2 + 18, 3 + 2)
    assert len(spec.make(byte_tokenizer, 2).train) == 4


def test_every_row_is_used_or_counted(spec, write_rows, byte_tokenizer, tmp_path):
    rows = [
        {"prompt": "p", "chosen": " ab", "rejected": " cd"},
        {"prompt": "p", "chosen": " ab", "rejected": " ab"},  # equal
        {"prompt": "p", "chosen": "abcdefgxx", "rejected": "abcdefgyy"},  # equal when cut
        {"prompt": "p", "chosen": "", "rejected": " ab"},  # an empty answer can be preferred
        {"prompt": "pppppppp", "chosen": " ab", "rejected": "abcdefg"},  # 8 tokens, 7 + end
    ]
    write_rows(rows, "set/train.jsonl")
    spec = spec.but(data_split="1", max_seq_len=8, max_prompt_len=5)
    report = spec.make(byte_tokenizer, 2).report.sources[0]
    # The long answers keep 7 of 10 tokens beside "p", and 4 of 8 beside "pppppppp".
    counted = (report.rows, report.used, report.identical_pairs, report.empty_answers)
    assert counted == (5, 3, 2, 0) and report.one_sided == 1
    assert report.line().endswith("3 answers cut, 1 pairs with an empty answer")
    assert (report.prompts_cut, report.answers_cut) == (1, 3)
    report = spec.make(byte_tokenizer, 1).report.sources[0]
    assert (report.rows, report.used, report.empty_answers) == (5, 4, 1)
    data = spec.make(byte_tokenizer, 3)
    assert (data.report.sources[0].used, data.report.sources[0].prompts_cut) == (5, 1)
    assert byte_tokenizer.decode(max(data.train["prompt_ids"], key=len)) == "ppppp"


@pytest.mark.parametrize("prompt_format, used", [("dschat", 1), ("raw", 2)])
def test_an_answer_of_white_space_says_nothing(tmp_path, byte_tokenizer, prompt_format, used):
    """It would teach to end at once; text that is taken as it stands may be so."""
    set_format(byte_tokenizer, prompt_format, teaches=True)
    convert = Converter(byte_tokenizer, choose_format(byte_tokenizer), 1, 64, None)
    counts = Counter()
    columns = convert([Example("p", text) for text in (" \n ", "a", "")], counts)
    assert (len(columns["input_ids"]), counts["empty_answers"]) == (used, 3 - used)


def test_report_reads_aloud_and_is_kept_with_the_set(spec, byte_tokenizer):
    first, again = (spec.make(byte_tokenizer, 2).report for _ in range(2))
    assert first == again
    name = spec.config.data_path[0]
    assert first.lines()[:2] == [
        f"{name} train: 4 of 10 rows (6 for other steps)",
        f"{name} eval: 3 of 3 rows",
    ]
    assert first.lines()[-1] == "preference pairs: 4 rows to train on, 3 to evaluate"


def test_sample_limits_are_seeded_choices(spec, byte_tokenizer):
    spec = spec.but(data_split="1", max_train_samples=6, max_eval_samples=2)
    first, again = (spec.make(byte_tokenizer, 1) for _ in range(2))
    assert (
        (first.report.train_rows, first.report.eval_rows)
        == (6, 2)
        == (
            len(first.train),
            len(first.eval),
        )
    )
    assert first.train["input_ids"][:] == again.train["input_ids"][:]


def test_cache_is_reused_and_every_change_makes_another(spec, write_rows, byte_tokenizer):
    spec.make(byte_tokenizer, 2)
    (folder,) = _folders(spec)
    stamp = (folder / "report.json").stat().st_mtime_ns
    spec.make(byte_tokenizer, 2)
    assert _folders(spec) == [folder]
    assert (folder / "report.json").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in folder.iterdir()) == [
        "digests.json",
        "eval-000.arrow",
        "report.json",
        "train-000.arrow",
    ]
    changes = (spec.but(seed=5), spec.but(max_seq_len=32), spec.but(data_split="1"))
    for count, changed in enumerate(changes, 2):
        changed.make(byte_tokenizer, 2)
        assert len(_folders(spec)) == count
    spec.make(byte_tokenizer, 1)
    byte_tokenizer.add_special_tokens({"eos_token": "<end>"})
    spec.make(byte_tokenizer, 2)
    write_rows([{**ROWS[0], "chosen": " new"}], "set/test.jsonl")
    edited = spec.make(byte_tokenizer, 2)
    assert len(_folders(spec)) == 7
    assert byte_tokenizer.decode(edited.eval[0]["chosen_ids"]) == "hi 0 new<end>"


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_several_processes_write_and_count_what_one_does(spec, write_rows, byte_tokenizer, phase):
    rows = [
        {"prompt": "p" * (n % 9), "chosen": f" {n}", "rejected": f" {n + n % 2}"} for n in range(60)
    ]
    write_rows([{**row, "prompt": "q" + row["prompt"]} for row in rows], "set/train.jsonl")
    found = []
    for workers in (1, 3):
        out = f"{spec.config.data_output_path}-{workers}"
        several = spec.but(data_split="1", max_seq_len=8, max_prompt_len=6, data_output_path=out)
        found.append(several.but(preprocessing_num_workers=workers).make(byte_tokenizer, phase))
    one, three = found
    assert three.train.to_list() == one.train.to_list()
    assert three.report == one.report and three.key == one.key
    report = one.report.sources[0]
    assert report.prompts_cut > 0 and (phase == 3 or report.used + report.identical_pairs == 60)
    assert len(list(data_utils.Path(out, "sets", one.key).glob("train-*.arrow"))) == 3


@pytest.mark.parametrize(
    ("given", "rows_each", "processes"),
    [(None, 11, 0), (None, 5, 2), (None, 1, 3), (7, 11, 7)],
)
def test_a_choice_of_processes(given, rows_each, processes, spec, byte_tokenizer, monkeypatch):
    """By rows, and by cores where they are fewer; ten rows train here, three are evaluated on."""
    chosen = []

    def tokenise(rows, convert, file, workers):
        chosen.append((len(rows), workers))
        return real(rows, convert, file)

    real = data_utils.tokenise
    monkeypatch.setattr(data_utils, "tokenise", tokenise)
    monkeypatch.setattr(data_utils, "_ROWS_PER_WORKER", rows_each)
    monkeypatch.setattr(data_utils, "_CORES", 3)
    spec.but(data_split="1", preprocessing_num_workers=given).make(byte_tokenizer, 1)
    assert chosen[0] == (10, processes)


def test_others_take_what_one_has_written(spec, byte_tokenizer):
    """What `once` gives is the folder: a rank that did not write it needs no source."""
    done = []

    def first(work):
        done.append(work())
        return done[0]

    one = spec.make(byte_tokenizer, 2, once=first)
    elsewhere = spec.but(data_path=("gone.jsonl",))
    other = elsewhere.make(byte_tokenizer, 2, once=lambda work: done[0])
    assert other.train.to_list() == one.train.to_list() and other.report == one.report


def _refused(spec, tokenizer, phase):
    with pytest.raises(UserError) as caught:
        spec.make(tokenizer, phase)
    message = str(caught.value)
    assert "\n" not in message
    assert _folders(spec) == []
    return message


def test_missing_column_is_named_with_its_row(spec, write_rows, byte_tokenizer):
    write_rows([ROWS[0], {"prompt": "a", "chosen": "b"}, *ROWS], "set/train.jsonl")
    message = _refused(spec, byte_tokenizer, 2)
    assert "train.jsonl line 2 has no 'rejected' (1 of 12 rows lack it)" in message
    write_rows([{"prompt": "a"}] * 10, "set/train.jsonl")
    assert "line 1 has no 'chosen' (10 of 10 rows" in _refused(spec, byte_tokenizer, 1)
    assert len(spec.make(byte_tokenizer, 3).train) == 4


def test_no_rows_left_is_refused(spec, write_rows, byte_tokenizer):
    message = _refused(spec.but(data_split="0,5,5"), byte_tokenizer, 1)
    assert "phase 1 (supervised fine-tuning) gets no rows" in message
    assert "under data_split '0,5,5': give phase 1 a larger share" in message
    write_rows([{**ROWS[0], "rejected": ROWS[0]["chosen"]}] * 3, "set/test.jsonl")
    assert "no eval rows" in _refused(spec, byte_tokenizer, 2)
    write_rows([{"prompt": ""}] * 3, "set/test.jsonl")
    assert "test.jsonl line 1: the prompt gives no tokens" in _refused(spec, byte_tokenizer, 3)
    assert "max_prompt_len" in _refused(spec.but(max_prompt_len=None), byte_tokenizer, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_seq_len": 3}, "max_seq_len is 3: give at least 4"),
        ({"data_path": ()}, "data_path is empty"),
        ({"data_split": "a"}, "data_split 'a'"),
        ({"seed": -1}, "seed is -1: give 0 or more"),
        ({"max_train_samples": 0}, "max_train_samples is 0: give at least 1"),
        ({"preprocessing_num_workers": 0}, "preprocessing_num_workers is 0: give at least 1"),
    ],
)
def test_bad_settings_are_refused(change, words, spec, byte_tokenizer):
    with pytest.raises(UserError, match=words):
        spec.but(**change).make(byte_tokenizer, 1)


def rows_of(number):
    return [{**ROWS[0], "prompt": f"hi {n}"} for n in range(number)]


def test_own_rows_go_to_every_step_unless_divided(spec, write_rows, byte_tokenizer):
    path = write_rows(rows_of(300), "pairs.jsonl")
    own = spec.but(data_path=(path,), data_split=None)
    for phase, name in PHASE_NAMES.items():
        data = own.make(byte_tokenizer, phase)
        assert data.report.lines() == [
            f"{path} train: 270 of 300 rows (30 held out)",
            f"{path} eval: 30 of 300 rows (270 for training)",
            f"{name}: 270 rows to train on, 30 to evaluate",
        ]
    divided = own.but(data_split="2,4,4")
    lines = [divided.make(byte_tokenizer, phase).report.lines()[0] for phase in (1, 2, 3)]
    assert lines == [
        f"{path} train: {count} of 300 rows (30 held out, {270 - count} for other steps)"
        for count in (54, 108, 108)
    ]


def test_sets_that_deepspeed_chat_names_are_divided(spec, write_rows, byte_tokenizer, tmp_path):
    write_rows(rows_of(100), "Dahoas/rm-static/train.jsonl")
    write_rows(rows_of(10), "Dahoas/rm-static/test.jsonl")
    named = spec.but(data_path=(str(tmp_path / "Dahoas" / "rm-static"),), data_split=None)
    trained = [len(named.make(byte_tokenizer, phase).train) for phase in (1, 2, 3)]
    assert trained == [20, 40, 40]
    assert len(named.but(data_split="1").make(byte_tokenizer, 1).train) == 100


def test_every_row_of_a_source_is_accounted_for(spec, write_rows, byte_tokenizer):
    """300 rows: 10 ties, of the rest 29 held out; of 261 half train, some pairs are equal."""
    rows = rows_of(300)
    for number, row in enumerate(rows):
        row["chosen"] = f" {number}"
        row |= {"score_chosen": 1, "score_rejected": int(number < 10)}
        if number >= 200:
            row["rejected"] = row["chosen"]
    path = write_rows(rows, "pairs.jsonl")
    spec = spec.but(data_path=(path,), data_split="1,1,0")
    train, held_out = spec.make(byte_tokenizer, 2).report.sources
    assert (train.rows, train.left) == (130, {"held out": 29, "for other steps": 131})
    assert train.skipped == {"tie": 10} and held_out.skipped == {}
    assert train.used + train.identical_pairs == 130 and 0 < train.identical_pairs < 130
    assert train.line() == (
        f"{path} train: {train.used} of 300 rows (29 held out, 131 for other steps, "
        f"{train.identical_pairs} identical pairs dropped, 10 unusable: tie)"
    )


def test_how_prompts_are_read_is_told(spec, write_rows, byte_tokenizer):
    set_format(byte_tokenizer, "dschat", teaches=True)
    marked = [{**row, "prompt": f"\n\nHuman: {row['prompt']}\n\nAssistant:"} for row in rows_of(50)]
    told = []
    for rows in (rows_of(50), marked, [*rows_of(50)[:25], *marked[25:]]):
        path = write_rows(rows, "pairs.jsonl")
        report = spec.but(data_path=(path,), data_split=None).make(byte_tokenizer, 2).report
        told.append([line.removeprefix(f"{path}: ") for line in report.lines()[2:-1]])
    says = "are plain text, each one question (prompt_format raw leaves text as it is)"
    assert told == [[f"prompts {says}"], [], [f"25 of 50 prompts {says}"]]


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_names_of_special_tokens_are_text_unless_kept(spec, write_rows, byte_tokenizer, phase):
    rows = [{**row, "chosen": f" {n}"} for n, row in enumerate(rows_of(20))]
    for number in range(5):
        rows[number]["prompt"] += " <eos> so"
        rows[number]["rejected"] = "<pad> <eos><eos>"
    path = write_rows(rows, "set/train.jsonl")
    own = spec.but(data_path=(path.removesuffix("/train.jsonl"),), data_split=None)
    column = {1: "input_ids", 2: "rejected_ids", 3: "prompt_ids"}[phase]
    ends = {}
    for kept in (False, True):
        data = own.but(keep_special_tokens=kept, max_prompt_len=64).make(byte_tokenizer, phase)
        special = byte_tokenizer.all_special_ids
        ends[kept] = sum(len([i for i in ids if i in special]) for ids in data.train[column])
        told = any("rows that name special tokens: 5;" in line for line in data.report.lines())
        assert told is not kept
    one_each = 0 if phase == 3 else 20
    # In a prompt; phase 2's rejected answer names a pad token too, and ends in its own end tokens.
    assert ends == {False: one_each, True: one_each + {1: 5, 2: 10, 3: 5}[phase]}
