"""What the flags of the steps mean, refuse and contradict."""

import math
import shlex

import pytest
import torch

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.answering import CompareSettings
from dschat.config.cli import parse
from dschat.config.programs import ChatSettings, InspectSettings, WinRateSettings
from dschat.config.unused import tell_unused, unused_flags
from dschat.data.batching import RowBatches
from dschat.data.token_batches import PackedBatches, TokenBudgetBatches
from dschat.errors import UserError
from dschat.models.reward_statistics import VALUE_FILE, RewardStatistics, write_statistics
from dschat.rlhf.estimators import ESTIMATORS
from dschat.rlhf.role_settings import RoleNames, RoleSettings
from dschat.settings import Settings
from dschat.utils.module.lora_config import LoraConfig
from tests.config.test_dschat_flags import script


def sft(*argv: str) -> SFTSettings:
    return parse(SFTSettings, ["--model_name_or_path", "m", *argv], "")


def reward(*argv: str) -> RewardSettings:
    return parse(RewardSettings, ["--model_name_or_path", "m", *argv], "")


def dpo(*argv: str) -> DPOSettings:
    return parse(DPOSettings, ["--model_name_or_path", "m", *argv], "")


def rlhf(*argv: str) -> RLHFSettings:
    models = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c"]
    return parse(RLHFSettings, [*models, *argv], "")


def winrate(*argv: str) -> WinRateSettings:
    given = ["--candidates", "a", "b", "--prompts", "p", "--judge", "j", *argv]
    return parse(WinRateSettings, given, None)


def compare(*argv: str) -> CompareSettings:
    return parse(CompareSettings, ["a", "b", "--prompts", "p", *argv], None)


def inspect(*argv: str) -> InspectSettings:
    return parse(InspectSettings, ["--model_name_or_path", "m", *argv], "")


def chat(*argv: str) -> ChatSettings:
    return parse(ChatSettings, ["--path", "m", *argv], "")


def rw_eval(*argv: str) -> Settings:
    settings = script("training/step2_reward_model_finetuning/rw_eval.py")["RewardEvaluation"]
    return parse(settings, ["--model_name_or_path", "m", *argv], "")


def test_a_run_of_deepspeed_chat_is_taken_as_it_was():
    """A command line of step 3 as its scripts write them, LoRA and ZeRO included."""
    settings = rlhf(
        *shlex.split(
            "--data_path Dahoas/rm-static --data_split 2,4,4 --num_padding_at_beginning 1 "
            "--per_device_generation_batch_size 4 --per_device_training_batch_size 2 "
            "--generation_batches 1 --ppo_epochs 1 --max_answer_seq_len 256 "
            "--max_prompt_seq_len 256 "
            "--actor_learning_rate 5e-4 --critic_learning_rate 5e-6 --num_train_epochs 1 "
            "--lr_scheduler_type cosine --gradient_accumulation_steps 2 --num_warmup_steps 100 "
            "--deepspeed --seed 1234 --actor_zero_stage 2 --critic_zero_stage 3 "
            "--actor_lora_dim 128 "
            "--actor_gradient_checkpointing --critic_gradient_checkpointing --actor_dropout 0.0 "
            "--enable_hybrid_engine --actor_lora_module_name decoder.layers. --offload "
            "--output_dir ./output --enable_ema --dtype bf16"
        )
    )
    setup = settings.role_setup("bf16", iterations=10)
    actor, critic = setup.actor, setup.critic
    assert (actor.model, critic.model) == ("a", "c")
    assert actor.engine.zero_stage == 2 and critic.engine.zero_stage == 3
    assert actor.engine.offload and critic.engine.offload
    assert actor.engine.micro_batch_size == 2 and actor.engine.gradient_accumulation_steps == 2
    assert actor.config.lora.lora_dim == 128 and critic.config.lora.lora_dim == 0
    assert actor.config.lora.lora_module_name == ("decoder.layers.",)
    assert actor.config.optimizer.rate("lora_A") == 5e-4
    assert actor.config.optimizer.rate("lora_B") == 16 * 5e-4
    assert critic.config.optimizer.rate("decay") == 5e-6
    assert actor.config.gradient_checkpointing and critic.config.gradient_checkpointing


def test_one_seed_in_all_steps():
    assert sft().run.seed == reward().run.seed == rlhf().run.seed == 1234


def test_the_rate_with_and_without_adapters():
    rates = sft().model.optimizer
    assert rates.rate("decay") == 9.65e-6
    rates = sft("--lora_dim", "8").model.optimizer
    # Three times the full rate is the geometric mean of A's and B's.
    assert rates.rate("lora_A") == pytest.approx(3 / 4 * 9.65e-6)
    assert rates.rate("lora_B") == pytest.approx(3 * 4 * 9.65e-6)
    assert rates.rate("decay") == 9.65e-6  # of what trains whole beside the adapters
    rates = sft("--lora_dim", "8", "--loraplus_lr_ratio", "1").model.optimizer
    assert rates.rate("lora_A") == rates.rate("lora_B") == pytest.approx(3 * 9.65e-6)
    both = ["--lora_dim", "8", "--learning_rate", "1e-3", "--loraplus_lr_ratio", "4"]
    rates = sft(*both).model.optimizer
    assert (rates.rate("lora_A"), rates.rate("lora_B")) == (1e-3, 4e-3)
    rates = sft(*both, "--lora_learning_rate", "1e-4").model.optimizer
    assert (rates.rate("lora_A"), rates.rate("decay")) == (1e-4, 1e-3)
    assert sft(*both).model.lora.lora_dim == 8 and sft().model.lora.lora_dim == 0


def test_layer_names_with_commas_and_spaces():
    argv = ["--lora_dim", "4", "--lora_module_name", "q_proj,v_proj", "fc"]
    assert sft(*argv).model.lora.lora_module_name == ("q_proj", "v_proj", "fc")


def test_ppo_flags_reach_the_loop():
    config = rlhf(
        *shlex.split(
            "--kl_coef 0.3 --cliprange 0.1 --cliprange_value 0.4 --gamma 0.99 --lam 0.9 "
            "--reward_clip 3 --missing_eos_penalty 1.5 --ppo_epochs 2 --max_answer_seq_len 17 "
            "--temperature 0.7 --top_p 0.8 --top_k 9 --per_device_generation_batch_size 6 "
            "--per_device_training_batch_size 3"
        )
    ).ppo
    assert (config.kl_coef, config.cliprange, config.cliprange_value) == (0.3, 0.1, 0.4)
    assert (config.gamma, config.lam) == (0.99, 0.9)
    assert (config.missing_eos_penalty, config.ppo_epochs) == (1.5, 2)
    sampling = config.sampling
    assert (sampling.max_answer_seq_len, sampling.temperature) == (17, 0.7)
    assert (sampling.top_p, sampling.top_k) == (0.8, 9)
    assert config.per_device_generation_batch_size == 6
    assert config.per_device_training_batch_size == 3


def test_flags_of_stability_reach_the_loop():
    config = rlhf(
        *shlex.split(
            "--kl_estimator k3 --kl_target 6 --kl_horizon 512 --whiten_advantages never "
            "--critic_warmup_iterations 3 --update_kl_limit 0.05 --cliprange_value 0"
        )
    ).ppo
    assert (config.kl_estimator, config.kl_target, config.kl_horizon) == ("k3", 6.0, 512)
    assert not config.whitens and config.cliprange_value == 0.0
    assert (config.critic_warmup_iterations, config.update_kl_limit) == (3, 0.05)
    default = rlhf().ppo
    assert default.whitens and default.kl_target is None and default.update_kl_limit == 0.0


def test_the_actors_schedule_begins_behind_the_critics_warm_up():
    """10 iterations of 2 epochs of 4 rows in windows of 2: the critic makes 40 steps."""
    argv = shlex.split(
        "--per_device_generation_batch_size 4 --per_device_training_batch_size 2 --ppo_epochs 2 "
        "--num_warmup_steps 0 --lr_scheduler_type linear"
    )

    def steps(*warmup: str) -> list[int]:
        found = []
        for role in rlhf(*argv, *warmup).role_setup("fp32", iterations=10).trained.values():
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            factor = role.schedule(optimizer).lr_lambdas[0]
            found.append(next(step for step in range(99) if factor(step) == 0.0))
        return found

    assert steps() == [40, 40]
    assert steps("--critic_warmup_iterations", "3") == [28, 40]


def test_a_warm_up_that_leaves_nothing_to_the_actor():
    argv = ["--critic_warmup_iterations", "7"]
    assert rlhf(*argv).iterations(8) == 8
    with pytest.raises(UserError, match="critic_warmup_iterations is 7, but the run has 7 iter"):
        rlhf(*argv).iterations(7)


@pytest.mark.parametrize(
    "argv, iterations",
    [
        ([], 7),
        (["--num_train_epochs", "2"], 14),
        (["--generation_batches", "2"], 4),  # 2 + 2 + 2 + 1 batches
        (["--max_steps", "3"], 3),
        (["--max_steps", "30"], 7),
        (["--enable_test_mode", "--test_stop_step", "2"], 2),
        (["--test_stop_step", "2"], 7),
    ],
)
def test_iterations_over_seven_batches(argv, iterations):
    assert rlhf(*argv).iterations(7) == iterations


@pytest.mark.parametrize(
    "argv, batches, updates, said",
    [
        ("", 1, 1, ""),
        ("--gradient_accumulation_steps 8", 8, 1, "each iteration takes 8 batches of prompts"),
        ("--gradient_accumulation_steps 2 --generation_batches 2", 2, 1, ""),
        ("--gradient_accumulation_steps 2 --answers_per_prompt 2", 1, 1, ""),
        ("--gradient_accumulation_steps 2 --per_device_training_batch_size 4", 1, 2, ""),
        ("--gradient_accumulation_steps 6 --per_device_training_batch_size 4", 2, 2, "adds up 2"),
        (
            "--gradient_accumulation_steps 2 --generation_batches 3 --ppo_epochs 2",
            3,
            4,
            "adds up 1",
        ),
    ],
)
def test_an_iteration_fills_an_accumulation_group(argv, batches, updates, said):
    """16 prompts and 16 rows a micro-batch unless given."""
    settings = rlhf(*argv.split())
    assert (settings.batches_per_iteration, settings.updates) == (batches, updates)
    assert settings.iterations(16) == math.ceil(16 / batches)
    lines = " ".join(settings.remarks(iterations=10**6))
    assert said in lines and bool(said) == bool(lines)


def test_a_short_run_of_ppo_is_said():
    """Seven iterations of two epochs, one window each, of an epoch's ten."""
    short = "optimizer steps in all: 14, too few to learn much from; give max_steps 10"
    for steps, said in ((4, 1), (5, 2)):
        settings = rlhf("--ppo_epochs", "2", "--num_warmup_steps", str(steps))
        lines = settings.length(iterations=7, batches_per_epoch=10).advice()
        assert lines[0] == f"advice: {short}" and len(lines) == said
    assert lines[1].startswith("advice: num_warmup_steps 5: more than a third of the run's 14 ")
    settings = rlhf("--ppo_epochs", "2", "--num_warmup_steps", "0")
    assert settings.length(iterations=10, batches_per_epoch=10).advice() == []
    # By 4, an iteration takes 4 batches: 10 iterations, one step each; by 2 there are 20 of them.
    accumulated = rlhf("--gradient_accumulation_steps", "4", "--num_warmup_steps", "0")
    fitting = accumulated.length(iterations=10, batches_per_epoch=40).with_more_steps()
    assert (fitting.accumulation, fitting.steps) == (2, 20)
    waiting = rlhf("--critic_warmup_iterations", "3", "--num_warmup_steps", "0")
    assert waiting.length(iterations=30, batches_per_epoch=30).steps == 27


def test_the_default_warm_up_of_ppo_is_a_tenth_of_a_short_run():
    def rising(*argv: str) -> list[int]:
        found = []
        for role in rlhf(*argv).role_setup("fp32", iterations=30).trained.values():
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            factor = role.schedule(optimizer).lr_lambdas[0]
            found.append(next(step for step in range(999) if factor(step) == 1.0))
        return found

    assert rising() == [3, 3]
    assert rising("--critic_warmup_iterations", "10") == [2, 3]
    assert rising("--num_warmup_steps", "9") == [9, 9]
    assert rising("--ppo_epochs", "40") == [100, 100]
    constant = rlhf("--lr_scheduler_type", "constant")
    assert [*constant.remarks(iterations=5), *constant.length(5, 30).advice()[1:]] == []
    (line,) = rlhf().remarks(iterations=30)
    assert line == (
        "num_warmup_steps 100, the default, is a tenth of a shorter run: 3 of the actor's 30 "
        "optimizer steps"
    )
    assert rlhf().length(iterations=30, batches_per_epoch=30).advice() == []


def test_a_warm_up_of_100_that_is_given_is_not_the_default():
    """The scripts give it: it is kept, and advice says that it is long."""
    given = rlhf("--num_warmup_steps", "100")
    assert given.warm_up(iterations=200) == 100 and [*given.remarks(iterations=200)] == []
    (line,) = given.length(200, 200).advice()
    assert line.startswith("advice: num_warmup_steps 100: more than a third of the run's 200 ")
    assert rlhf().warm_up(iterations=200) == 20
    constant = rlhf("--num_warmup_steps", "100", "--lr_scheduler_type", "constant")
    assert [*unused_flags(constant)] == [
        "--num_warmup_steps does nothing: --lr_scheduler_type constant never changes the rate"
    ]


def test_sampling_from_a_part_of_the_distribution_is_said():
    settings = rlhf("--top_p", "0.9", "--min_answer_seq_len", "3")
    (line,) = settings.remarks(iterations=10**6)
    assert line.startswith("top_p, min_answer_seq_len: answers come from a part")


def test_how_training_rows_become_batches():
    assert sft("--per_device_train_batch_size", "3").sampler() == RowBatches(3)
    assert sft("--max_tokens_per_batch", "4096").sampler() == TokenBudgetBatches(4096)
    assert reward("--max_tokens_per_batch", "4096").sampler() == TokenBudgetBatches(
        4096, sequences=2
    )
    packed = sft("--packing", "--per_device_train_batch_size", "3", "--max_seq_len", "256")
    assert packed.sampler() == PackedBatches(3, 256)
    with pytest.raises(UserError, match=r"packing and max_tokens_per_batch: .*drop one"):
        sft("--packing", "--max_tokens_per_batch", "4096")
    with pytest.raises(UserError, match="max_tokens_per_batch is 511: a row may have 512"):
        sft("--max_tokens_per_batch", "511")
    with pytest.raises(UserError, match="max_tokens_per_batch is 1000: a pair may have 1024"):
        reward("--max_tokens_per_batch", "1000")


def test_seed_and_length_of_the_data():
    settings = rlhf("--max_prompt_seq_len", "100", "--max_answer_seq_len", "30")
    assert (settings.max_seq_len, settings.run.seed) == (130, 1234)


@pytest.mark.parametrize("build", [sft, reward, rlhf])
@pytest.mark.parametrize(
    "argv, message",
    [
        (["--only_optimize_lora", "--train_base_model"], "contradict"),
        (["--num_train_epochs", "0"], "num_train_epochs is 0: give a whole number in [1, 10000]"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps is 0"),
        (["--num_warmup_steps", "-1"], "num_warmup_steps is -1"),
        (["--log_every", "0"], "log_every is 0"),
        (["--lr_scheduler_type", "warm"], "argument --lr_scheduler_type: invalid choice: 'warm'"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["--lora_dimension", "8"], "unknown flag --lora_dimension; did you mean --"),
    ],
)
def test_what_every_step_refuses(build, argv, message):
    with pytest.raises(UserError) as error:
        build(*argv)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0"),
        (["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size is 0"),
        (["--max_seq_len", "0"], "max_seq_len is 0"),
        (["--max_steps", "-1"], "max_steps is -1: give 0 or more"),
        (["--max_tokens_per_batch", "511"], "max_tokens_per_batch is 511: a "),
        (["--zero_stage", "4"], "argument --zero_stage: invalid choice: 4"),
        (["--lora_init", "C"], "argument --lora_init: invalid choice: 'C'"),
    ],
)
@pytest.mark.parametrize("build", [sft, reward])
def test_what_steps_1_and_2_refuse(build, argv, message):
    with pytest.raises(UserError) as error:
        build(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--offload"], "offload needs ZeRO"),
        (["--offload", "--critic_zero_stage", "2"], "offload needs ZeRO"),
        (["--ema_decay", "1.0"], "ema_decay is 1.0"),
        (["--unsupervised_dataset_name", "wiki", "--unsup_coef", "0"], "unsup_coef is 0.0"),
        (["--unsupervised_dataset_config_name", "x"], "config_name x: there is no text"),
        (["--reward_function_weight", "2"], "reward_function_weight is 2.0, and there is no"),
        (["--reward_model_weight", "0"], "reward_model_weight is 0: nothing is rewarded"),
        (["--print_answers_interval", "0"], "print_answers_interval is 0: give at least 1"),
        (["--generation_batches", "0"], "generation_batches is 0"),
        (["--max_prompt_seq_len", "0"], "max_prompt_seq_len is 0"),
        (["--max_answer_seq_len", "0"], "max_answer_seq_len is 0"),
        (["--max_steps", "-1"], "max_steps is -1"),
        (["--eval_interval", "-1"], "eval_interval is -1"),
        (["--test_stop_step", "-1"], "test_stop_step is -1"),
        (["--kl_coef", "nan"], "kl_coef is nan"),
        (["--reward_clip", "nan"], "reward_clip is nan"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--kl_target", "nan"], "kl_target is nan"),
        (["--ppo_epochs", "0"], "ppo_epochs is 0"),
        (["--per_device_training_batch_size", "0"], "per_device_training_batch_size is 0"),
        (["--per_device_generation_batch_size", "0"], "per_device_generation_batch_size is 0"),
        (["--temperature", "0"], "temperature is 0.0"),
        (["--cliprange", "0"], "cliprange is 0.0"),
        (["--advantage_estimator", "rloo"], "answers_per_prompt is 1: give 2 or more"),
        (["--kl_horizon", "100"], "kl_horizon is 100, but kl_coef is fixed: give kl_target"),
        (["--kl_target", "6", "--kl_coef", "0"], "kl_target scales kl_coef, which is 0"),
        (["--critic_warmup_iterations", "-1"], "critic_warmup_iterations is -1"),
        (["--update_kl_limit", "-1"], "update_kl_limit is -1.0"),
        (["--answers_per_prompt", "0"], "answers_per_prompt is 0"),
        (["--generation_chunk_size", "-1"], "generation_chunk_size is -1"),
        (["--min_answer_seq_len", "257"], "min_answer_seq_len is 257: give at most max_answer_seq"),
        (["--stop_strings", "a", ""], "stop_strings holds an empty text"),
        (["--fuse_lora_for_generation"], "fuse_lora_for_generation: the actor has no adapters"),
        (
            ["--fuse_lora_for_generation", "--actor_lora_dim", "4", "--actor_zero_stage", "3"],
            "fuse_lora_for_generation: at actor_zero_stage 3 no rank holds a complete weight",
        ),
        (["--actor_lora_dim", "-1"], "lora_dim is -1"),
        (["--actor_learning_rate", "0"], "learning_rate is 0.0"),
        (["--zero_stage", "2"], "unknown flag --zero_stage; did you mean --"),
    ],
)
def test_what_step_3_refuses_before_it_starts(argv, message):
    with pytest.raises(UserError) as error:
        rlhf(*argv)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("build", [sft, reward])
def test_offload_needs_zero(build):
    with pytest.raises(UserError, match="offload needs ZeRO"):
        build("--offload")
    settings = build("--offload", "--zero_stage", "2")
    assert settings.run.engine_config(settings.model, "fp32", 1).offload


def test_settings_of_rollouts():
    flags = (
        "--answers_per_prompt 3 --generation_chunk_size 5 --min_answer_seq_len 7 "
        "--temperature 0.5 --actor_lora_dim 4 --fuse_lora_for_generation"
    )
    settings = rlhf(*shlex.split(flags), "--stop_strings", "\n\n", "User:")
    config = settings.ppo
    assert (config.answers_per_prompt, config.generation_chunk_size) == (3, 5)
    assert config.sampling.stop_strings == ("\n\n", "User:")
    assert (config.sampling.min_answer_seq_len, config.sampling.temperature) == (7, 0.5)
    assert (
        settings.rollouts.fuse_lora_for_generation and not rlhf().rollouts.fuse_lora_for_generation
    )


def test_the_schedule_counts_every_answer():
    """Four prompts of three answers in micro-batches of six: two steps an iteration."""
    flags = (
        "--answers_per_prompt 3 --per_device_generation_batch_size 4 "
        "--per_device_training_batch_size 6 --lr_scheduler_type linear --num_warmup_steps 0"
    )
    actor = rlhf(*shlex.split(flags)).role_setup("fp32", iterations=5).actor
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule, rates = actor.schedule(optimizer), []
    for _ in range(10):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1 - i / 10 for i in range(10)])
    assert schedule.get_last_lr() == [0.0]


def test_the_scaling_of_a_critics_values_is_read_from_its_folder(tmp_path):
    own, scores = RewardStatistics(1.0, 3.0, 4, "x"), RewardStatistics(5.0, 2.0, 8, "x")
    write_statistics(own, tmp_path, VALUE_FILE)
    settings = rlhf(
        "--critic_model_name_or_path", str(tmp_path), "--reward_model_name_or_path", "r"
    )
    assert settings.role_setup("fp32", 1, scaling=scores).value_scaling == own
    assert settings.role_setup("fp32", 1).value_scaling is None


def test_offload_reaches_the_frozen_copies():
    setup = rlhf().role_setup("fp32", iterations=1)
    assert (setup.reference.offload, setup.reward.offload) == (False, False)
    setup = rlhf("--offload_reference_model").role_setup("fp32", iterations=1)
    assert (setup.reference.offload, setup.reward.offload) == (True, False)
    setup = rlhf("--offload_reward_model").role_setup("fp32", iterations=1)
    assert (setup.reference.offload, setup.reward.offload) == (False, True)


def test_what_trains():
    assert sft("--lora_dim", "4").run.complete(sft("--lora_dim", "4").model).base_is_frozen
    both = sft("--lora_dim", "4", "--train_base_model")
    assert not both.run.complete(both.model).base_is_frozen
    assert not sft().run.complete(sft().model).base_is_frozen


RLOO = ["--advantage_estimator", "rloo", "--answers_per_prompt", "2"]


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], []),
        (["--actor_dropout", "0.0"], []),
        (["--reward_clip", "2"], []),
        (
            ["--init_head_randomly", "--reward_function", "m:f", "--reward_clip", "2"],
            ["--reward_clip does nothing: it clips a reward model's scores, and none of"],
        ),
        (
            ["--reward_model_weight", "0", "--reward_function", "m:f", "--reward_clip", "2"],
            ["--reward_clip does nothing: it clips a reward model's scores, and none of"],
        ),
        (
            ["--reward_model_weight", "0", "--reward_function", "m:f", "--reward_scaling", "none"],
            ["--reward_scaling does nothing: it scales a reward model's scores, and none of"],
        ),
        (
            ["--cliprange", "0.1", "--update_kl_limit", "0.2"],
            ["--cliprange does nothing: an iteration", "--update_kl_limit does nothing: an iter"],
        ),
        (["--cliprange", "0.1", "--update_kl_limit", "0.2", "--ppo_epochs", "2"], []),
        (["--actor_dropout", "0.1"], ["--actor_dropout does nothing"]),
        (
            ["--critic_lora_dim", "4", "--critic_lora_dropout", "0.1"],
            ["--critic_lora_dropout does nothing"],
        ),
        (["--offload_reference_model", "--offload_reward_model"], []),
        (
            ["--offload_reference_model", "--actor_lora_dim", "4"],
            ["--offload_reference_model does nothing: with LoRA the reference model is the actor"],
        ),
        (
            ["--offload_reward_model", "--critic_lora_dim", "4"],
            ["--offload_reward_model does nothing: with LoRA the reward model is the critic"],
        ),
        (["--offload_reward_model", "--critic_lora_dim", "4", "--train_base_model"], []),
        (["--unsup_coef", "2"], ["--unsup_coef does nothing without --unsupervised_dataset_name"]),
        (["--ema_decay", "0.5"], ["--ema_decay does nothing without --enable_ema"]),
        (["--ema_decay", "0.5", "--enable_ema"], []),
        (["--test_stop_step", "2"], ["--test_stop_step does nothing without --enable_test_mode"]),
        (["--enable_test_mode"], ["--enable_test_mode does nothing without --test_stop_step"]),
        (
            ["--print_answers_interval", "5"],
            ["--print_answers_interval does nothing without --print_answers"],
        ),
        (
            ["--actor_lora_alpha", "8", "--critic_lora_dim", "4", "--critic_lora_alpha", "8"],
            ["--actor_lora_alpha does nothing: without --actor_lora_dim there are no adapters"],
        ),
        (["--actor_head_learning_rate", "1e-3"], ["--actor_head_learning_rate does nothing"]),
        (["--train_base_model"], ["--train_base_model does nothing: without LoRA all weights"]),
        # The frozen reward model is sharded by the critic's stage.
        ([*RLOO, "--critic_zero_stage", "3"], []),
        (
            [*RLOO, "--critic_lora_dim", "4"],
            ["--critic_lora_dim does nothing: --advantage_estimator rloo trains no critic"],
        ),
        (
            [*RLOO, "--critic_learning_rate", "1e-4", "--critic_gradient_checkpointing"],
            ["--critic_gradient_checkpointing, --critic_learning_rate do nothing: --advantage"],
        ),
    ],
)
def test_step_3_says_what_does_nothing(argv, said):
    lines = list(unused_flags(rlhf(*argv)))
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))


@pytest.mark.parametrize(
    "build, argv, said",
    [
        (sft, "", ""),
        (sft, "--lora_dim 4 --lora_alpha 8 --only_optimize_lora --lora_save merged", ""),
        (reward, "--only_optimize_lora", "--only_optimize_lora does nothing: without LoRA all"),
        (sft, "--lora_alpha 8", "--lora_alpha does nothing: without --lora_dim there are no"),
        (
            sft,
            "--lora_init B --loraplus_lr_ratio 8",
            "--loraplus_lr_ratio, --lora_init do nothing: without --lora_dim there are no adapters",
        ),
        (reward, "--train_base_model", "--train_base_model does nothing: without LoRA all weights"),
        (sft, "--lora_save merged", "--lora_save merged does nothing: without LoRA"),
        (sft, "--head_learning_rate 1e-3", "--head_learning_rate does nothing: a language model"),
        (reward, "--head_learning_rate 1e-3", ""),
        (
            sft,
            "--lora_dim 4 --lora_embedding_learning_rate 1e-3",
            "--lora_embedding_learning_rate does nothing: --lora_module_name names no embedding",
        ),
        (
            sft,
            "--lora_dim 4 --lora_embedding_learning_rate 1e-3 --lora_module_name wte",
            "",
        ),
        (sft, "--trainable_tokens none", "--trainable_tokens does nothing: without --lora_dim"),
        (
            reward,
            "--lora_dim 4 --trainable_tokens none --trainable_tokens_learning_rate 1e-3",
            "--trainable_tokens_learning_rate does nothing with --trainable_tokens none",
        ),
        (
            sft,
            "--lora_dim 4 --train_base_model --modules_to_save norm",
            "--modules_to_save does nothing: --train_base_model takes its place",
        ),
        (sft, "--eot_token x", "--eot_token does nothing without --add_eot_token"),
        (sft, "--eot_token x --add_eot_token", ""),
        (sft, "--tensorboard_path x", "--tensorboard_path does nothing without --enable_tens"),
        (sft, "--tensorboard_path x --report_to tensorboard", ""),
        (sft, "--save_total_limit 2", "--save_total_limit does nothing without --save_steps"),
        (reward, "--eval_iters 2", "--eval_iters does nothing without --eval_interval"),
        (reward, "--eval_iters 2 --eval_interval 5", ""),
        (
            sft,
            "--max_tokens_per_batch 4096 --per_device_train_batch_size 4",
            "--per_device_train_batch_size does nothing: --max_tokens_per_batch takes its place",
        ),
        (
            sft,
            "--lr_scheduler_type constant --num_warmup_steps 5",
            "--num_warmup_steps does nothing: --lr_scheduler_type constant never changes",
        ),
        (dpo, "--head_learning_rate 1e-3", "--head_learning_rate does nothing: a language model"),
        (dpo, "--beta 0.3 --label_smoothing 0.1", ""),
        (dpo, "--loss_type orpo --label_smoothing 0.1", "--label_smoothing does nothing: --loss"),
        (
            dpo,
            "--simpo_gamma 0.5",
            "--simpo_gamma does nothing: --loss_type sigmoid has no such coefficient; of simpo",
        ),
        (dpo, "--loss_type kto --desirable_weight 2 --undesirable_weight 3", ""),
        (
            dpo,
            "--loss_type simpo --reference precomputed",
            "--reference precomputed does nothing: --loss_type simpo compares with no reference",
        ),
        (dpo, "--loss_type robust --label_smoothing 0", "--loss_type robust does nothing: with"),
        (rlhf, "--lr_scheduler_type constant", ""),  # its warm-up is a default
        (sft, "--train_on_prompt --train_on last_turn", "--train_on does nothing: --train_on_pr"),
        (rlhf, "--generation_chunk_size 16", "--generation_chunk_size does nothing: a device sam"),
        (rlhf, "--generation_chunk_size 16 --answers_per_prompt 2", ""),
        (rlhf, "--enable_test_mode --test_stop_step 5 --max_steps 5", "--test_stop_step does not"),
        (rlhf, "--enable_test_mode --test_stop_step 5 --max_steps 6", ""),
        (chat, "--top_p 0.5", ""),
        (chat, "--top_p 0.5 --temperature 0", "--top_p does nothing: at --temperature 0 nothing "),
        (rw_eval, "--max_train_samples 5", "--max_train_samples does nothing: the rows that are "),
        (rw_eval, "--max_eval_samples 5", ""),
        (compare, "", ""),
        (compare, "--port 80", "--port does nothing without --live"),
        (compare, "--max_seq_len 99", "--max_seq_len does nothing without --reward_model"),
        (compare, "--max_seq_len 99 --reward_model r", ""),
        (compare, "--greedy --top_p 0.5", "--top_p does nothing: --greedy takes its place"),
        (compare, "--greedy --seed 3", "--seed does nothing: with --greedy nothing is drawn"),
        (winrate, "--seed 3 --temperature 0.5 --max_seq_len 99", ""),
        (winrate, "--greedy --temperature 2", "--temperature does nothing: --greedy takes its"),
        (inspect, "", ""),
        (inspect, "--eot_token x", "--eot_token does nothing without --add_eot_token"),
        (inspect, "--phase 1 --max_prompt_seq_len 9", "--max_prompt_seq_len does nothing in phase"),
        (
            inspect,
            "--phase 2 --train_on last_turn",
            "--train_on does nothing in phase 2; it is of ",
        ),
        (inspect, "--phase 3 --max_tokens_per_batch 99", "--max_tokens_per_batch does nothing in"),
        (
            inspect,
            "--phase 3 --sft_only_data_path x --data_path y",
            "--sft_only_data_path does not",
        ),
        (inspect, "--train_on last_turn --max_prompt_seq_len 9 --max_tokens_per_batch 9999", ""),
        (inspect, "--max_tokens_per_batch 9999 --per_device_train_batch_size 4", ""),
        (rlhf, "--only_optimize_lora", "--only_optimize_lora does nothing: without LoRA"),
    ],
)
def test_every_program_says_what_does_nothing(build, argv, said):
    lines = list(unused_flags(build(*argv.split())))
    assert len(lines) == (said != "") and "".join(lines).startswith(said)


def test_what_does_nothing_is_printed_once_on_the_first_rank(capsys, monkeypatch):
    tell_unused(sft("--lora_alpha", "8"))
    assert capsys.readouterr().out.count("does nothing") == 1
    monkeypatch.setenv("RANK", "1")
    tell_unused(sft("--lora_alpha", "8"))
    assert capsys.readouterr().out == ""


RETIRED = {
    sft: ["compute_fp32_loss"],
    reward: ["compute_fp32_loss", "num_padding_at_beginning"],
    dpo: ["compute_fp32_loss", "num_padding_at_beginning", "offload_reference_model"],
    rlhf: [
        "compute_fp32_loss",
        "enable_mixed_precision_lora",
        "align_overflow",
        "num_padding_at_beginning",
        "enable_hybrid_engine",
        "unpin_actor_parameters",
        "release_inference_cache",
        "inference_tp_size",
        "tp_gather_partition_size",
    ],
}
WITH_VALUE = {"num_padding_at_beginning", "inference_tp_size", "tp_gather_partition_size"}


@pytest.mark.parametrize(
    "build, name", [(build, name) for build, names in RETIRED.items() for name in names]
)
def test_retired_flags_say_so(capsys, build, name):
    build(f"--{name}", *(["1"] if name in WITH_VALUE else []))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"--{name} does nothing: ")


def test_every_option_of_adapters_reaches_its_model():
    options = (
        "--{0}lora_dim 8 --{0}lora_alpha 4 --{0}lora_init B --{0}use_rslora --{0}use_dora "
        "--{0}lora_module_name all-linear,embed_tokens --{0}modules_to_save norm lm_head "
        "--{0}lora_learning_rate 2e-4 --{0}loraplus_lr_ratio 8 "
        "--{0}lora_embedding_learning_rate 3e-6 "
        "--{0}trainable_tokens </s> 7 --{0}trainable_tokens_learning_rate 5e-4"
    )
    for config in (
        (one := sft(*options.format("").split())).run.complete(one.model),
        (two := reward(*options.format("").split())).run.complete(two.model),
        (three := rlhf(*options.format("actor_").split())).run.complete(three.actor),
        (four := rlhf(*options.format("critic_").split())).run.complete(four.critic),
    ):
        lora, rates = config.lora, config.optimizer
        assert (lora.lora_dim, lora.scaling, lora.lora_init) == (8, pytest.approx(4 / 8**0.5), "B")
        assert lora.use_dora and lora.lora_module_name == ("all-linear", "embed_tokens")
        assert lora.modules_to_save == ("norm", "lm_head")
        assert rates.rate("lora_A") == rates.rate("lora_magnitude") == 2e-4
        assert rates.rate("lora_B") == pytest.approx(16e-4)
        assert rates.rate("lora_embedding") == 3e-6
        assert config.trainable_tokens == ("</s>", "7") and rates.rate("token_rows") == 5e-4
        assert not config.base_is_frozen  # what trains whole changes with adapters off as well
    assert four.actor.lora == three.critic.lora == LoraConfig()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "packed weights cannot train; add adapters with lora_dim"),
        ("--lora_dim 8 --train_base_model", "drop train_base_model"),
        ("--lora_dim 8 --zero_stage 3", "use zero_stage 0, 1 or 2"),
    ],
)
def test_quantised_base_where_it_cannot_serve(argv: str, words: str):
    settings = sft("--quantize_base", "4bit", *argv.split())
    with pytest.raises(UserError, match=f"quantize_base 4bit: .*{words}"):
        settings.run.complete(settings.model)


def test_quantised_base_needs_its_package(monkeypatch):
    settings = sft("--quantize_base", "8bit", "--lora_dim", "8")
    assert settings.run.complete(settings.model).lora.quantize_base == "8bit"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="bitsandbytes is not installed; run `pip install"):
        settings.run.complete(settings.model)


@pytest.mark.parametrize(
    "flags, names",
    [
        ("--critic_model_name_or_path c", RoleNames("a", "c", "c")),
        (
            "--critic_model_name_or_path c --reward_model_name_or_path r --share_trunk none",
            RoleNames("a", "c", "r", share_trunk="none"),
        ),
        (
            "--critic_model_name_or_path a --reward_model_name_or_path r --init_head_randomly",
            RoleNames("a", "a", "r", fresh_head=True),
        ),
        (
            "--critic_model_name_or_path c --advantage_estimator rloo --answers_per_prompt 2",
            RoleNames("a", None, "c"),
        ),
        (
            "--reward_model_name_or_path r --advantage_estimator grpo --answers_per_prompt 2",
            RoleNames("a", None, "r"),
        ),
    ],
)
def test_who_plays_which_role(flags, names):
    argv = ["--actor_model_name_or_path", "a", *flags.split()]
    settings = parse(RLHFSettings, argv, "")
    assert settings.role_names() == names
    setup = settings.role_setup("fp32", iterations=1)
    assert [*setup.trained] == ["actor", "critic"][: 1 + (names.critic is not None)]
    assert setup.reward.model == names.reward


@pytest.mark.parametrize(
    "estimator, says",
    [
        ("gae", "critic_model_name_or_path is required with advantage_estimator gae; rloo and"),
        ("rloo", "rloo: nothing gives rewards; add reward_model_name_or_path REWARD_MODEL or"),
    ],
)
def test_roles_that_nothing_plays(estimator, says):
    argv = ["--actor_model_name_or_path", "a", "--advantage_estimator", estimator]
    argv += ["--answers_per_prompt", "2"]
    with pytest.raises(UserError, match=f"^{says}"):
        parse(RLHFSettings, argv, "")


def test_two_folders_for_one_reward_model():
    roles = RoleSettings("a", "c", "r")
    with pytest.raises(
        UserError, match=r"^critic_model_name_or_path c: .* rloo trains no critic, a"
    ):
        roles.names(ESTIMATORS["rloo"], has_reward_function=False)
    names = RoleSettings("a", "r", "r").names(ESTIMATORS["rloo"], has_reward_function=False)
    assert names == RoleNames("a", None, "r")


def test_a_function_can_give_the_rewards_alone():
    names = RoleSettings("a").names(ESTIMATORS["rloo"], has_reward_function=True)
    assert names == RoleNames("a", None, None)
    fresh = RoleSettings("a", "a", init_head_randomly=True)
    names = fresh.names(ESTIMATORS["gae"], has_reward_function=True)
    assert names == RoleNames("a", "a", None, fresh_head=True)
