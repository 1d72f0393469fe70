#!/usr/bin/env bash
# Step 2 on one GPU: OPT-350M, all weights.
# Usage: bash run_350m.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over those here]
set -euo pipefail

STEP_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
OUTPUT="${1:-./output}"
ZERO_STAGE="${2:-0}"
shift "$(($# < 2 ? $# : 2))"
mkdir -p "$OUTPUT"

deepspeed --num_gpus 1 "$STEP_DIR/main.py" \
  --model_name_or_path facebook/opt-350m \
  --num_padding_at_beginning 1 \
  --weight_decay 0.1 \
  --dropout 0.0 \
  --gradient_accumulation_steps 4 \
  --zero_stage "$ZERO_STAGE" \
  --enable_tensorboard \
  --tensorboard_path "$OUTPUT" \
  --deepspeed \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | tee -a "$OUTPUT/training.log"
