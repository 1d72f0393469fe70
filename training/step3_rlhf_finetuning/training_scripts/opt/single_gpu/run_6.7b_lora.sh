#!/usr/bin/env bash
# Step 3 on one GPU: an OPT-6.7B actor with LoRA+, an OPT-350M critic.
# Usage: bash run_6.7b_lora.sh ACTOR_MODEL_PATH CRITIC_MODEL_PATH [ACTOR_ZERO_STAGE] [CRITIC_ZERO_STAGE] [OUTPUT] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=opt/single_gpu/ppo_6.7b_lora.yaml
take "ACTOR_MODEL_PATH:the folder that step 1 wrote" "CRITIC_MODEL_PATH:the folder that step 2 wrote" \
  ACTOR_ZERO_STAGE= CRITIC_ZERO_STAGE= OUTPUT=./output -- "$@"
start
