#!/usr/bin/env bash
# Step 1 on one GPU: OPT-1.3B with LoRA+.
# Usage: bash run_1.3b.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over those here]
set -euo pipefail

STEP_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
OUTPUT="${1:-./output}"
ZERO_STAGE="${2:-0}"
shift "$(($# < 2 ? $# : 2))"
mkdir -p "$OUTPUT"

# Full fine-tuning of this model takes 9.65e-6. Adapters start from three times that, which is the
# geometric mean of A's rate, given here, and of B's, which LoRA+ makes 16 times as large
# (--loraplus_lr_ratio; docs/lora_plus.md has the measurements).
deepspeed --num_gpus 1 "$STEP_DIR/main.py" \
  --model_name_or_path facebook/opt-1.3b \
  --gradient_accumulation_steps 8 \
  --lora_dim 128 \
  --learning_rate 7.2e-6 \
  --loraplus_lr_ratio 16 \
  --zero_stage "$ZERO_STAGE" \
  --enable_tensorboard \
  --tensorboard_path "$OUTPUT" \
  --deepspeed \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | tee -a "$OUTPUT/training.log"
