"""Every flag of DeepSpeed-Chat is accepted by the script that had it."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from dschat.config import DPOSettings, RewardSettings, RLHFSettings, SFTSettings
from dschat.config.programs import ChatSettings
from dschat.settings import flags_of

ROOT = Path(__file__).resolve().parents[2]
SHARED = (
    "data_path data_split data_output_path num_train_epochs gradient_accumulation_steps "
    "lr_scheduler_type num_warmup_steps output_dir seed local_rank offload dtype "
    "only_optimize_lora compute_fp32_loss enable_tensorboard tensorboard_path add_eot_token"
)
ONE_MODEL = (
    "model_name_or_path per_device_train_batch_size per_device_eval_batch_size max_seq_len "
    "learning_rate weight_decay gradient_checkpointing dropout zero_stage lora_dim "
    "lora_module_name lora_learning_rate"
)
# The flags of DeepSpeed-Chat, script by script.
STEP1 = f"{SHARED} {ONE_MODEL} sft_only_data_path eot_token print_loss"
STEP2 = f"{SHARED} {ONE_MODEL} num_padding_at_beginning eval_interval eval_iters"
DPO = (
    f"{SHARED} {ONE_MODEL} beta label_smoothing offload_reference_model print_loss "
    "num_padding_at_beginning"
)
STEP3 = (
    f"{SHARED} unsupervised_dataset_name unsupervised_dataset_config_name unsup_coef "
    "actor_model_name_or_path critic_model_name_or_path num_padding_at_beginning "
    "per_device_generation_batch_size per_device_training_batch_size generation_batches "
    "ppo_epochs max_prompt_seq_len max_answer_seq_len actor_learning_rate critic_learning_rate "
    "actor_weight_decay critic_weight_decay preprocessing_num_workers enable_hybrid_engine "
    "unpin_actor_parameters release_inference_cache inference_tp_size tp_gather_partition_size "
    "offload_reference_model offload_reward_model actor_zero_stage critic_zero_stage "
    "actor_gradient_checkpointing critic_gradient_checkpointing actor_dropout critic_dropout "
    "actor_lora_dim actor_lora_module_name critic_lora_dim critic_lora_module_name "
    "actor_lora_learning_rate critic_lora_learning_rate enable_ema enable_mixed_precision_lora "
    "align_overflow print_answers print_answers_interval enable_test_mode test_stop_step"
)
PROMPT_EVAL = (
    "model_name_or_path_baseline model_name_or_path_finetune num_beams num_beam_groups top_k "
    "penalty_alpha num_return_sequences max_new_tokens language add_eot_token"
)
RW_EVAL = "model_name_or_path num_padding_at_beginning add_eot_token"
CHAT = "path max_new_tokens"
E2E = {
    "--step": ["1", "3"],
    "--actor-model": ["facebook/opt-1.3b"],
    "--reward-model": ["350m"],
    "--actor-zero-stage": ["2"],
    "--reward-zero-stage": ["3"],
    "--output-dir": ["./output"],
    "--deployment-type": ["single_node"],
}


def script(path: str) -> dict[str, Any]:
    """The names of a script of the checkout, without running its main()."""
    name = f"script_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def assert_accepts(settings: type, names: str) -> None:
    assert set(names.split()) - {flag.name for flag in flags_of(settings)} == set()


@pytest.mark.parametrize(
    "settings, names",
    [
        (SFTSettings, STEP1),
        (RewardSettings, STEP2),
        (DPOSettings, DPO),
        (RLHFSettings, STEP3),
        (ChatSettings, CHAT),
    ],
    ids=["step1", "step2", "dpo", "step3", "chat"],
)
def test_the_flags_of_deepspeed_chat(settings, names):
    assert_accepts(settings, names)


def test_the_flags_of_prompt_eval():
    names = script("training/step1_supervised_finetuning/prompt_eval.py")
    assert_accepts(names["PromptEvaluation"], PROMPT_EVAL)


def test_the_flags_of_rw_eval():
    names = script("training/step2_reward_model_finetuning/rw_eval.py")
    assert_accepts(names["RewardEvaluation"], RW_EVAL)


def test_the_flags_of_e2e_rlhf():
    argv = [word for name, values in E2E.items() for word in (name, *values)]
    args = script("e2e_rlhf.py")["parse_args"](argv)
    assert list(args.step) == [1, 3] and args.deployment_type == "single_node"
