#!/usr/bin/env bash
# Step 3 on all GPUs of one machine: as run_llama2_7b_lora.sh.
# DeepSpeed-Chat sharded frozen weights in eight bits here; main.py says that its flag does nothing.
# Usage: bash run_llama2_7b_mixz.sh ACTOR_MODEL_PATH CRITIC_MODEL_PATH [ACTOR_ZERO_STAGE] [CRITIC_ZERO_STAGE] [OUTPUT] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../launch.sh"

RECIPE=llama2/single_node/ppo_7b_lora.yaml
take "ACTOR_MODEL_PATH:the folder that step 1 wrote" "CRITIC_MODEL_PATH:the folder that step 2 wrote" \
  ACTOR_ZERO_STAGE= CRITIC_ZERO_STAGE= OUTPUT=./output_step3_llama2 -- "$@"
start --enable_mixed_precision_lora
