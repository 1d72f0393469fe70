#!/usr/bin/env bash
# Step 3 on all GPUs of one machine: an OPT-1.3B actor with LoRA+, an OPT-350M critic.
# Usage: bash run_1.3b_lora.sh ACTOR_MODEL_PATH CRITIC_MODEL_PATH [ACTOR_ZERO_STAGE] [CRITIC_ZERO_STAGE] [OUTPUT] [more flags of main.py, which win over those here]
set -euo pipefail

STEP_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
ACTOR_MODEL_PATH="${1:?the folder that step 1 wrote}"
CRITIC_MODEL_PATH="${2:?the folder that step 2 wrote}"
ACTOR_ZERO_STAGE="${3:-0}"
CRITIC_ZERO_STAGE="${4:-0}"
OUTPUT="${5:-./output}"
shift "$(($# < 5 ? $# : 5))"
mkdir -p "$OUTPUT"

# Full fine-tuning of this model takes 9.65e-6. Adapters start from three times that, which is the
# geometric mean of A's rate, given here, and of B's, which LoRA+ makes 16 times as large
# (--loraplus_lr_ratio; docs/lora_plus.md has the measurements).
deepspeed --master_port 12346 "$STEP_DIR/main.py" \
  --data_path Dahoas/rm-static \
  --data_split 2,4,4 \
  --actor_model_name_or_path "$ACTOR_MODEL_PATH" \
  --critic_model_name_or_path "$CRITIC_MODEL_PATH" \
  --num_padding_at_beginning 1 \
  --per_device_generation_batch_size 4 \
  --per_device_training_batch_size 4 \
  --generation_batches 1 \
  --ppo_epochs 1 \
  --max_answer_seq_len 256 \
  --max_prompt_seq_len 256 \
  --actor_learning_rate 7.2e-6 \
  --critic_learning_rate 5e-6 \
  --num_train_epochs 1 \
  --lr_scheduler_type cosine \
  --gradient_accumulation_steps 1 \
  --actor_dropout 0.0 \
  --num_warmup_steps 100 \
  --seed 1234 \
  --actor_zero_stage "$ACTOR_ZERO_STAGE" \
  --critic_zero_stage "$CRITIC_ZERO_STAGE" \
  --actor_lora_dim 128 \
  --actor_lora_module_name decoder.layers. \
  --actor_loraplus_lr_ratio 16 \
  --deepspeed \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | tee -a "$OUTPUT/training.log"
