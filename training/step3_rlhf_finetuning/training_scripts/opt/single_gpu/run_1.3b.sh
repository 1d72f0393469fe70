#!/usr/bin/env bash
# Step 3 on one GPU: an OPT-1.3B actor with LoRA+, an OPT-350M critic.
# Usage: bash run_1.3b.sh ACTOR_MODEL_PATH CRITIC_MODEL_PATH [ACTOR_ZERO_STAGE] [CRITIC_ZERO_STAGE] [OUTPUT] [more flags of main.py, which win over those here]
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
deepspeed --num_gpus 1 "$STEP_DIR/main.py" \
  --actor_model_name_or_path "$ACTOR_MODEL_PATH" \
  --critic_model_name_or_path "$CRITIC_MODEL_PATH" \
  --num_padding_at_beginning 1 \
  --actor_zero_stage "$ACTOR_ZERO_STAGE" \
  --critic_zero_stage "$CRITIC_ZERO_STAGE" \
  --generation_batches 2 \
  --gradient_accumulation_steps 2 \
  --actor_lora_dim 128 \
  --actor_learning_rate 7.2e-6 \
  --actor_loraplus_lr_ratio 16 \
  --actor_gradient_checkpointing \
  --actor_dropout 0.0 \
  --deepspeed \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | tee -a "$OUTPUT/training.log"
