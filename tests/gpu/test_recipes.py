"""The three steps on the GPU, in miniature: SFT, reward model, PPO."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers.steps import PPO, REWARD, SFT, run_worker, write_inputs
from tests.helpers.steps_outputs import assert_all_finite, load

DATA = ["--data_path", "data", "--data_split", "4,4,2", "--data_output_path", "cache"]
BATCH = ["--per_device_train_batch_size", "8", "--max_seq_len", "64", "--log_every", "1"]
LORA = ["--lora_dim", "4", "--learning_rate", "1e-3"]
LENGTHS = ["--max_prompt_seq_len", "48", "--max_answer_seq_len", "8", "--num_warmup_steps", "0"]
SAMPLES = ["--per_device_generation_batch_size", "8", "--per_device_training_batch_size", "8"]
RATES = ["--actor_learning_rate", "1e-3", "--critic_learning_rate", "1e-3"]
MODELS = ["--actor_model_name_or_path", "sft", "--critic_model_name_or_path", "reward"]


def test_all_steps_run(tmp_path: Path, device):
    """In the dtype that the GPU has: bf16 since Ampere."""
    write_inputs(tmp_path)
    plan = [
        [SFT, "--model_name_or_path", "model", *DATA, *BATCH, *LORA, "--output_dir", "sft"],
        [REWARD, "--model_name_or_path", "sft", *DATA, *BATCH, *LORA, "--output_dir", "reward"],
        [PPO, *MODELS, *DATA, *LENGTHS, *SAMPLES, *RATES, "--actor_lora_dim", "4"],
    ]
    plan[2] += ["--output_dir", "ppo"]
    results, printed = run_worker(plan, tmp_path, ranks=1, gpu=device.type == "cuda")
    assert [result.code for result in results] == [0, 0, 0], printed[-4000:]
    for name in ("sft", "reward", "ppo"):
        assert_all_finite(tmp_path / name)
    for name in ("sft", "ppo/actor"):
        load(AutoModelForCausalLM, tmp_path / name)
    for name in ("reward", "ppo/critic"):
        load(AutoModelForSequenceClassification, tmp_path / name)
