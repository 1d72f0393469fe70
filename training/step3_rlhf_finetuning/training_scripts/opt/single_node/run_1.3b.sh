#!/usr/bin/env bash
# Step 3 on all GPUs of one machine: an OPT-1.3B actor and an OPT-350M critic, all weights.
# Usage: bash run_1.3b.sh ACTOR_MODEL_PATH CRITIC_MODEL_PATH [ACTOR_ZERO_STAGE] [CRITIC_ZERO_STAGE] [OUTPUT] [more flags of main.py, which win over those here]
set -euo pipefail

STEP_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
ACTOR_MODEL_PATH="${1:?the folder that step 1 wrote}"
CRITIC_MODEL_PATH="${2:?the folder that step 2 wrote}"
ACTOR_ZERO_STAGE="${3:-2}"
CRITIC_ZERO_STAGE="${4:-2}"
OUTPUT="${5:-./output}"
shift "$(($# < 5 ? $# : 5))"
mkdir -p "$OUTPUT"

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
  --actor_learning_rate 9.65e-6 \
  --critic_learning_rate 5e-6 \
  --num_train_epochs 1 \
  --lr_scheduler_type cosine \
  --gradient_accumulation_steps 1 \
  --actor_dropout 0.0 \
  --num_warmup_steps 100 \
  --seed 1234 \
  --actor_zero_stage "$ACTOR_ZERO_STAGE" \
  --critic_zero_stage "$CRITIC_ZERO_STAGE" \
  --enable_ema \
  --enable_tensorboard \
  --tensorboard_path "$OUTPUT" \
  --deepspeed \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | tee -a "$OUTPUT/training.log"
