#!/usr/bin/env bash
# Step 1 on one GPU: OPT-1.3B with LoRA+.
# Usage: bash run_1.3b.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over those here]
set -euo pipefail

STEP_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
OUTPUT="${1:-./output}"
ZERO_STAGE="${2:-0}"
shift "$(($# < 2 ? $# : 2))"
mkdir -p "$OUTPUT"

# Full fine-tuning of this model takes 9.65e-6. Adapters want a larger rate, because they start from
# no effect at all and change the weights only through a product of small matrices: two to three
# times the full rate is where to start. This is A's rate; LoRA+ trains B at 16 times it
# (--loraplus_lr_ratio).
deepspeed --num_gpus 1 "$STEP_DIR/main.py" \
  --model_name_or_path facebook/opt-1.3b \
  --gradient_accumulation_steps 8 \
  --lora_dim 128 \
  --learning_rate 2.5e-5 \
  --loraplus_lr_ratio 16 \
  --zero_stage "$ZERO_STAGE" \
  --enable_tensorboard \
  --tensorboard_path "$OUTPUT" \
  --deepspeed \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | tee "$OUTPUT/training.log"
