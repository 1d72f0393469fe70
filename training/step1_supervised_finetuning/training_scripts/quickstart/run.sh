#!/usr/bin/env bash
# Step 1 on one GPU or on the CPU, sized for the embedded default: a small model learns to answer.
# Usage: bash run.sh MODEL DATA [OUTPUT] [more flags of main.py, which win over those here]
set -euo pipefail

STEP_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
MODEL="${1:?a model folder or hub id}"
DATA="${2:?a data file or folder}"
OUTPUT="${3:-./output}"
shift "$(($# < 3 ? $# : 3))"
mkdir -p "$OUTPUT"

# A model that starts from random weights learns with all of them; adapters come in step 3.
python "$STEP_DIR/main.py" \
  --model_name_or_path "$MODEL" \
  --data_path "$DATA" \
  --data_split 1 \
  --data_output_path "$OUTPUT/.data" \
  --max_seq_len 64 \
  --per_device_train_batch_size 16 \
  --per_device_eval_batch_size 128 \
  --learning_rate 3e-3 \
  --num_train_epochs 2 \
  --num_warmup_steps 20 \
  --dtype fp32 \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | tee -a "$OUTPUT/training.log"
