#!/usr/bin/env bash
# Step 1 on all GPUs of one machine: OPT-1.3B, all weights.
# Usage: bash run_1.3b.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over those here]
set -euo pipefail

STEP_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
OUTPUT="${1:-./output}"
ZERO_STAGE="${2:-2}"
shift "$(($# < 2 ? $# : 2))"
mkdir -p "$OUTPUT"

deepspeed "$STEP_DIR/main.py" \
  --data_path \
    Dahoas/rm-static \
    Dahoas/full-hh-rlhf \
    Dahoas/synthetic-instruct-gptj-pairwise \
    yitingxie/rlhf-reward-datasets \
  --data_split 2,4,4 \
  --model_name_or_path facebook/opt-1.3b \
  --per_device_train_batch_size 8 \
  --per_device_eval_batch_size 8 \
  --max_seq_len 512 \
  --learning_rate 9.65e-6 \
  --weight_decay 0. \
  --num_train_epochs 16 \
  --gradient_accumulation_steps 1 \
  --lr_scheduler_type cosine \
  --num_warmup_steps 0 \
  --seed 1234 \
  --zero_stage "$ZERO_STAGE" \
  --enable_tensorboard \
  --tensorboard_path "$OUTPUT" \
  --deepspeed \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | tee -a "$OUTPUT/training.log"
