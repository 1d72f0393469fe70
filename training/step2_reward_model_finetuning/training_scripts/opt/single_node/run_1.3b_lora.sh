#!/usr/bin/env bash
# Step 2 on all GPUs of one machine: OPT-1.3B with LoRA+.
# Usage: bash run_1.3b_lora.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over those here]
set -euo pipefail

STEP_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
OUTPUT="${1:-./output}"
ZERO_STAGE="${2:-0}"
shift "$(($# < 2 ? $# : 2))"
mkdir -p "$OUTPUT"

# Full fine-tuning of this model takes 9.65e-6. Adapters start from three times that, which is the
# geometric mean of A's rate, given here, and of B's, which LoRA+ makes 16 times as large
# (--loraplus_lr_ratio; docs/lora_plus.md has the measurements).
deepspeed "$STEP_DIR/main.py" \
  --data_path \
    Dahoas/rm-static \
    Dahoas/full-hh-rlhf \
    Dahoas/synthetic-instruct-gptj-pairwise \
    yitingxie/rlhf-reward-datasets \
  --data_split 2,4,4 \
  --model_name_or_path facebook/opt-1.3b \
  --num_padding_at_beginning 1 \
  --per_device_train_batch_size 4 \
  --per_device_eval_batch_size 4 \
  --max_seq_len 512 \
  --learning_rate 9.65e-6 \
  --lora_learning_rate 7.2e-6 \
  --weight_decay 0.1 \
  --num_train_epochs 1 \
  --dropout 0.0 \
  --gradient_accumulation_steps 1 \
  --lr_scheduler_type cosine \
  --num_warmup_steps 0 \
  --seed 1234 \
  --zero_stage "$ZERO_STAGE" \
  --lora_dim 128 \
  --lora_module_name decoder.layers. \
  --loraplus_lr_ratio 16 \
  --only_optimize_lora \
  --deepspeed \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | tee -a "$OUTPUT/training.log"
