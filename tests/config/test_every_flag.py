"""Every flag of every program against values of every kind: a clear line, or known to be valid.

The tables at the top are all that is valid among zero, negative and huge numbers, and why; every
other case must be refused, and every case in them accepted.
"""

import argparse
import contextlib
import importlib
import math
from collections.abc import Iterator

import pytest

from dschat.command.registry import COMMANDS
from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.answering import CompareSettings
from dschat.config.cli import parse
from dschat.config.help import OneLineParser, add_flag
from dschat.config.programs import ChatSettings, InspectSettings, WinRateSettings
from dschat.errors import UserError
from dschat.pipeline.pipeline_settings import PipelineSettings
from dschat.plan.flags import PlanFlags
from dschat.settings import Flag, Settings, flags_of
from tests.config.test_dschat_flags import script

PROGRAMS: dict[str, type[Settings]] = {
    "step1": SFTSettings,
    "step2": RewardSettings,
    "dpo": DPOSettings,
    "step3": RLHFSettings,
    "run": PipelineSettings,
    "plan": PlanFlags,
    "winrate": WinRateSettings,
    "compare": CompareSettings,
    "inspect": InspectSettings,
    "chat": ChatSettings,
    "rw_eval": script("training/step2_reward_model_finetuning/rw_eval.py")["RewardEvaluation"],
    "prompt_eval": script("training/step1_supervised_finetuning/prompt_eval.py")[
        "PromptEvaluation"
    ],
}
# Given so that a flag that needs another one is reached by its own check.
NEEDED = {
    "model_name_or_path": "m",
    "actor_model_name_or_path": "m",
    "critic_model_name_or_path": "m",
    "model_name_or_path_baseline": "m",
    "model_name_or_path_finetune": "m",
    "path": "m",
}
NEEDED_OF = {
    "winrate": {"candidates": ("m", "n"), "prompts": "m", "judge": "m"},
    "compare": {"models": ("m", "n"), "prompts": "m"},
    "plan": {"config": "dschat/recipes/opt/single_gpu/sft_1.3b.yaml"},
}
# Commands that take words, or hand their flags on.
MODULES = {
    name: f"{COMMANDS[name].program}.__main__"
    if name in ("report", "run")
    else COMMANDS[name].program
    for name in ("merge", "push", "report", "checkpoint", "doctor", "completion", "run")
}
# Names without `actor_` and `critic_`.
ZERO_IS_VALID = {
    "centering_coefficient": "no centring",
    "cliprange_value": "values are not clipped",
    "critic_warmup_iterations": "none",
    "dropout": "none",
    "dynamic_sampling_rounds": "none",
    "ema_decay": "the average is the newest weights",
    "endless_share": "all answers keep their end token",
    "eval_interval": "per epoch only",
    "gamma": "a token is worth its own reward",
    "generation_chunk_size": "all answers at a time",
    "gradient_clipping": "none",
    "kl_coef": "no penalty",
    "label_smoothing": "no label is taken for wrong",
    "lam": "one-step advantages",
    "local_rank": "a launcher's",
    "lora_dim": "no adapters",
    "lora_dropout": "none",
    "margin": "none",
    "max_steps": "after the data",
    "min_answer_seq_len": "an answer may end at once",
    "missing_eos_penalty": "none",
    "num_warmup_steps": "no warm-up",
    "samples": "none is shown",
    "rollout_importance_cap": "no weights",
    "rollouts_ahead": "answers are of the present policy",
    "save_steps": "no checkpoints",
    "seed": "a seed like any other",
    "show": "none is shown",
    "simpo_gamma": "no margin",
    "temperature": "chat takes the likeliest token",
    "test_stop_step": "no early stop",
    "top_k": "no restriction, in step 3",
    "update_kl_limit": "no limit",
    "usd_per_gpu_hour": "free",
    "weight_decay": "none",
    "zero_stage": "no shards",
}
REFUSED_AT_ZERO = {
    ("step3", "temperature"),
    ("winrate", "temperature"),
    ("compare", "temperature"),
    ("prompt_eval", "top_k"),
}
NEGATIVE_IS_VALID = {
    "local_rank": "a launcher's, -1 without one",
    "margin": "the rejected answer may lead by so much",
    "reward_model_weight": "rewards may be turned round",
}
WRONG: dict[type, tuple] = {
    int: ("text", 1.5, math.nan, math.inf, -math.inf, True, [1], 10**20, -(10**20)),
    float: ("text", math.nan, math.inf, -math.inf, True, [1.0], 1e300, -1e300, 10**400),
    str: ("", 3, True, math.nan, ["x"]),
    bool: ("yes", "", 1, 0, [True]),
}


def flags(program: str) -> list[Flag]:
    return [flag for flag in flags_of(PROGRAMS[program]) if not flag.rule.retired]


def refusal(program: str, flag: Flag, value: object) -> str | None:
    """The message about one value; None where it is accepted. Anything else raised is a failure."""
    names = {f.name for f in flags_of(PROGRAMS[program])}
    needed: dict = {name: text for name, text in NEEDED.items() if name in names}
    needed |= NEEDED_OF.get(program, {})
    given = (value,) if flag.kind.is_tuple and value is not None else value
    try:
        flag.rule.check(flag.name, given, flag.kind)  # the same check, without the others
        PROGRAMS[program].of(**needed | {flag.name: given})
    except UserError as error:
        return str(error)
    return None


def is_clear(message: str | None, flag: Flag) -> bool:
    """Tell whether a message names the flag, or its name within its group, on one line."""
    return message is not None and flag.path[-1] in message and "\n" not in message


def plain(flag: Flag) -> str:
    return flag.name.removeprefix("actor_").removeprefix("critic_")


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_no_flag_takes(program: str):
    for flag in flags(program):
        for value in WRONG[flag.kind.element]:
            message = refusal(program, flag, value)
            assert is_clear(message, flag), (flag.name, value, message)
    for flag in flags(program):
        if not flag.kind.is_optional:
            message = refusal(program, flag, None)
            assert is_clear(message, flag), (flag.name, None, message)


def numbers(program: str) -> Iterator[Flag]:
    return (f for f in flags(program) if f.kind.element in (int, float))


@pytest.mark.parametrize("program", PROGRAMS)
def test_zero_is_refused_unless_it_means_something(program: str):
    for flag in numbers(program):
        valid = plain(flag) in ZERO_IS_VALID and (program, flag.name) not in REFUSED_AT_ZERO
        valid |= flag.name == "critic_warmup_iterations"
        message = refusal(program, flag, flag.kind.element(0))
        assert (message is None) == valid and (valid or is_clear(message, flag)), (flag, message)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_negative_number_is_refused_unless_it_means_something(program: str):
    for flag in numbers(program):
        valid = plain(flag) in NEGATIVE_IS_VALID
        message = refusal(program, flag, flag.kind.element(-1))
        assert (message is None) == valid and (valid or is_clear(message, flag)), (flag, message)


def test_the_tables_name_nothing_else():
    names = {plain(flag) for program in PROGRAMS for flag in numbers(program)}
    names.add("critic_warmup_iterations")
    assert ZERO_IS_VALID.keys() | NEGATIVE_IS_VALID.keys() <= names


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_no_command_line_takes(program: str):
    parser = OneLineParser()
    for flag in flags(program):
        add_flag(parser, flag)
    for flag in flags(program):
        name, may_stand_alone = f"--{flag.name}", flag.rule.may_be_empty or flag.rule.bare
        cases = [[name, "text"]] if flag.kind.element in (int, float) else []
        if flag.kind.element is bool:
            cases.append([f"{name}=text"])
        elif not may_stand_alone:
            cases.append([name])
        for argv in cases:
            with pytest.raises(UserError) as error:
                parser.parse_args(argv)
            message = str(error.value)
            assert message.startswith(f"argument {name}: ") and "\n" not in message


# Pairs that contradict each other, and the words of their message.
CONTRADICTIONS = {
    "step1": {
        "--only_optimize_lora --train_base_model": "contradict: drop one",
        "--offload": "offload needs ZeRO",
        "--streaming": "give max_steps",
        "--streaming --max_steps 5 --save_steps 2": "save_steps or resume",
        "--streaming --max_steps 5 --packing": "packing",
        "--streaming --max_steps 5 --num_train_epochs 2": "num_train_epochs",
        "--packing --max_tokens_per_batch 4096": "drop one",
        "--max_tokens_per_batch 8 --max_seq_len 16": "max_tokens_per_batch is 8",
        "--resume_with_new_rates": "add resume",
        "--data_split 1,2": "data_split",
        "--data_split a": "data_split",
        "--data_split -1,1,1": "data_split",
        "--data_split nan": "data_split",
        "--data_split 0,0,0": "data_split",
        "--wandb_project x": "wandb is not installed",
    },
    "step2": {
        "--max_tokens_per_batch 1000": "a pair may have 1024",
        "--train_head_only --lora_dim 4": "contradict: adapters change the trunk; drop one",
    },
    "rw_eval": {
        "--stdin --data_path x": "stdin and data_path contradict",
        "--stdin --all_rows": "stdin and all_rows contradict",
        "--stdin --output_dir x": "stdin and output_dir contradict",
        "--all_rows --data_path x --streaming": "drop streaming",
    },
    "compare": {
        "--models m n --prompts p --live": "live and prompts contradict",
        "--models m n --reward_model m --live": "the live page scores nothing; drop one",
    },
    "inspect": {"--streaming": "inspect looks at all rows"},
    "run": {
        "--ranks 2 --hostfile x --hardware multi_node": "ranks 2: the hostfile decides them",
        "--ranks 1000000000": "ranks is 1000000000: give a whole number in [1, 1024]",
    },
    "dpo": {
        "--max_tokens_per_batch 1000": "a pair may have 1024",
        "--reference adapters_off": "nothing can be switched off; use precomputed",
        "--reference adapters_off --lora_dim 4 --train_base_model": "more than the adapters trains",
        "--label_smoothing 0.5": "label_smoothing is 0.5: give a number in [0, 0.5)",
        "--loss_type dpo": "invalid choice: 'dpo'",
        "--streaming --max_steps 5": "cannot be computed beforehand",
        "--streaming --max_steps 5 --lora_dim 4 --reference precomputed": "train adapters",
        "--streaming --max_steps 5 --lora_dim 4 --loss_type kto": "drop streaming",
    },
    "step3": {
        "--kl_target 6 --kl_coef 0": "kl_coef, which is 0",
        "--kl_horizon 10": "give kl_target",
        "--min_answer_seq_len 9 --max_answer_seq_len 8": "at most max_answer_seq_len",
        "--advantage_estimator rloo": "answers_per_prompt is 1",
        "--advantage_estimator rloo --answers_per_prompt 2 --lam 0.5": "has no critic",
        "--advantage_std none": "divides by no deviation",
        "--importance_level sequence": "an advantage of its own",
        "--dynamic_sampling_rounds 1": "compares no answers",
        "--advantage_estimator grpo --answers_per_prompt 2 --dynamic_sampling_rounds 1 "
        "--streaming --max_steps 5": "a stream cannot be read from two places",
        "--reward_function pattern": "does nothing without reward_pattern",
        "--fuse_lora_for_generation": "no adapters",
        "--share_trunk all": "actor_lora_dim 0",
        "--init_head_randomly": "nothing gives rewards",
        "--reward_function_weight 2": "there is no function",
        "--reward_model_weight 0": "nothing is rewarded",
        "--unsupervised_dataset_config_name x": "there is no text",
    },
}


@pytest.mark.parametrize(
    ("program", "argv"), [(p, argv) for p, cases in CONTRADICTIONS.items() for argv in cases]
)
def test_contradictions(program: str, argv: str):
    names = {flag.name for flag in flags_of(PROGRAMS[program])}
    models = [w for n in NEEDED if n in names for w in (f"--{n}", "m")]
    if "wandb" in argv and _has("wandb"):
        pytest.skip("the package is there")
    with pytest.raises(UserError) as error:
        parse(PROGRAMS[program], [*models, *argv.split()], "")
    message = str(error.value)
    assert CONTRADICTIONS[program][argv] in message and "\n" not in message


def _has(package: str) -> bool:
    with contextlib.suppress(ImportError):
        return bool(__import__(package))
    return False


E2E_REFUSES = [
    (["--step", "4"], "argument --step: invalid choice: 4"),
    (["--step", "one"], "argument --step: invalid int value"),
    (["--actor-zero-stage", "7"], "invalid choice: '7'"),
    (["--seed", "nan"], "argument --seed: invalid int value"),
    (["--num-warmup-steps", "1.5"], "argument --num-warmup-steps: invalid int value"),
    (["--gradient-accumulation-steps", "inf"], "invalid int value: 'inf'"),
    (["--deployment-type", ""], "argument --deployment-type: invalid choice: ''"),
    (["--output-dir", ""], "argument --output-dir: it is empty"),
    (["--actor-model", ""], "argument --actor-model: it is empty"),
    (["--actor-model", "m", "--reward-model", ""], "argument --reward-model: it is empty"),
    (["--actor-model", "m", "--data-path", ""], "argument --data-path: it is empty"),
    (["--reward-model", "350m"], "--reward-model needs --actor-model"),
    (["--data-path", "x"], "--data-path needs --actor-model"),
    (["--dataset-columns", "prompt=x"], "--dataset-columns needs --actor-model"),
    (["--actor-model", "m", "--dataset-columns", ""], "--dataset_columns: it is empty"),
    (["--reward-zero-stage", "-1"], "invalid choice: '-1'"),
    (["--hostfile", ""], "argument --hostfile: it is empty"),
    (["--hostfile", "x"], "--hostfile needs --actor-model"),
    (["--num-train-epochs", "all"], "argument --num-train-epochs: invalid int value: 'all'"),
    (["--save-steps", "0.5"], "--save_steps: invalid int value: '0.5'"),
    (["--overwrite-output-dir=yes"], "--overwrite-output-dir: ignored explicit argument"),
    (["--resume=last"], "argument --resume: ignored explicit argument 'last'"),
    (["--dry-run=no"], "argument --dry-run: ignored explicit argument 'no'"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
]


@pytest.mark.parametrize(("argv", "words"), E2E_REFUSES)
def test_what_e2e_rlhf_refuses(argv: list[str], words: str):
    with pytest.raises(UserError) as error:
        script("e2e_rlhf.py")["parse_args"](argv)
    assert words in str(error.value) and "\n" not in str(error.value)


REFUSED = [
    ("merge", "", "the following arguments are required: adapter, output_dir"),
    ("merge", "a b --dtype fp8", "argument --dtype: invalid choice: 'fp8'"),
    ("merge", "./nowhere b", "./nowhere"),
    ("merge", "a b --overwrite_output_dir=no", "--overwrite_output_dir: ignored explicit"),
    ("merge", "a b c", "unrecognized arguments: c"),
    ("push", "", "the following arguments are required: folder, repository"),
    ("push", "a b c", "unrecognized arguments: c"),
    ("push", "a b --public=yes", "argument --public: ignored explicit argument 'yes'"),
    ("report", "", "the following arguments are required: output_dir"),
    ("report", "nowhere --base x", "nowhere: holds no metrics.jsonl; give"),
    ("report", "nowhere", "nowhere: holds no metrics.jsonl; give"),
    ("report", "nowhere --outputdir x", "unrecognized arguments: --outputdir"),
    ("checkpoint", "", "the following arguments are required: command, folder"),
    ("checkpoint", "verfy x", "invalid choice: 'verfy'"),
    ("checkpoint", "verify nowhere", "nowhere: has no state.json, so it is no checkpoint"),
    ("checkpoint", "convert nowhere", "nowhere: has no state.json, so it is no checkpoint"),
    ("checkpoint", "inspect a b", "target b: inspect writes no checkpoint; drop it"),
    ("checkpoint", "verify a b", "target b: verify writes no checkpoint; drop it"),
    ("checkpoint", "convert a b c", "unrecognized arguments: c"),
    ("doctor", "--gpu", "unrecognized arguments: --gpu"),
    ("completion", "", "the following arguments are required: shell"),
    ("completion", "tcsh", "argument shell: invalid choice: 'tcsh'"),
    ("run", "", "name a pipeline first"),
    ("run", "nowhere.yaml", "nowhere.yaml: no such file or pipeline"),
    ("run", "quickstart --rank 2", "unknown flag --rank; did you mean --ranks?"),
]


@pytest.mark.parametrize(("command", "argv", "words"), REFUSED)
def test_what_programs_without_settings_refuse(
    command: str, argv: str, words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["program", *argv.split()])
    main = importlib.import_module(MODULES[command]).main
    with pytest.raises(UserError) as error:
        main()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["e2e", "merge", "push", "report", "checkpoint", "completion"])
def test_every_flag_of_a_parser_of_its_own_has_a_case(command: str, monkeypatch):
    """Those of settings are walked through above; these would be forgotten."""
    parsers: list[argparse.ArgumentParser] = []

    class SeenError(Exception):
        pass

    def see(parser: argparse.ArgumentParser, *_: object) -> None:
        parsers.append(parser)
        raise SeenError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", see)
    if command == "e2e":
        main = script("e2e_rlhf.py")["parse_args"]
    else:
        main = importlib.import_module(MODULES[command]).main
    with pytest.raises(SeenError):
        main()
    cases = E2E_REFUSES if command == "e2e" else [c[1:] for c in REFUSED if c[0] == command]
    tried = " ".join(f"{argv} {words}" for argv, words in cases)
    for action in parsers[0]._actions:
        names = action.option_strings or [action.dest]
        assert "--help" in names or any(name in tried for name in names), names


def test_every_command_is_in_one_of_the_tables():
    names = {"sft": "step1", "reward": "step2", "ppo": "step3", "eval": "rw_eval"}
    tabled = PROGRAMS.keys() | MODULES.keys()
    assert {names.get(name, name) for name in COMMANDS} <= tabled
