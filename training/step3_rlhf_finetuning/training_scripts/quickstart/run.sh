#!/usr/bin/env bash
# Step 3 on one GPU or on the CPU, sized for the embedded default: PPO, actor and critic with LoRA+.
# Usage: bash run.sh ACTOR CRITIC DATA [OUTPUT] [more flags of main.py, which win over those here]
set -euo pipefail

STEP_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
ACTOR="${1:?the folder that step 1 wrote}"
CRITIC="${2:?the folder that step 2 wrote}"
DATA="${3:?a data file or folder}"
OUTPUT="${4:-./output}"
shift "$(($# < 4 ? $# : 4))"
mkdir -p "$OUTPUT"

# --actor_learning_rate is what all weights of so small a model would take; its adapters take three
# times that in the geometric mean of A's rate and B's.
python "$STEP_DIR/main.py" \
  --actor_model_name_or_path "$ACTOR" \
  --critic_model_name_or_path "$CRITIC" \
  --data_path "$DATA" \
  --data_split 0,0,1 \
  --data_output_path "$OUTPUT/.data" \
  --max_prompt_seq_len 32 \
  --max_answer_seq_len 32 \
  --per_device_generation_batch_size 128 \
  --per_device_training_batch_size 32 \
  --max_steps 40 \
  --actor_lora_dim 16 \
  --actor_learning_rate 4e-4 \
  --actor_lora_learning_rate 3e-4 \
  --actor_loraplus_lr_ratio 16 \
  --critic_lora_dim 16 \
  --critic_learning_rate 4e-4 \
  --critic_lora_learning_rate 4e-4 \
  --critic_loraplus_lr_ratio 16 \
  --kl_coef 0.4 \
  --reward_clip 20 \
  --reward_scaling none \
  --lr_scheduler_type cosine \
  --num_warmup_steps 0 \
  --dtype fp32 \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | tee -a "$OUTPUT/training.log"
