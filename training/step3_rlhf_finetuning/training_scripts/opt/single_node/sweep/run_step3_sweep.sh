#!/usr/bin/env bash
# Step 3 on all GPUs of one machine: an OPT-1.3B actor and an OPT-350M critic with ZeRO 2 and 3, offload
# and LoRA, five iterations and a folder each.
# Usage: bash run_step3_sweep.sh [ACTOR_MODEL_PATH] [CRITIC_MODEL_PATH] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../../launch.sh"

take ACTOR_MODEL_PATH=AdamG012/chat-opt-1.3b-sft-deepspeed \
  CRITIC_MODEL_PATH=AdamG012/chat-opt-350m-reward-deepspeed -- "$@"
for stage in 2 3; do
  for offload in true false; do
    for lora in true false; do
      attempt "$ACTOR_MODEL_PATH" "$CRITIC_MODEL_PATH" "$stage" "$stage" false "$offload" "$lora" false \
        "z${stage}_offload_${offload}_lora_${lora}" true 5 ${MORE[@]+"${MORE[@]}"}
    done
  done
done
conclude
