#!/usr/bin/env bash
# Step 3 on one GPU: a Llama-3-8B-Instruct actor and critic with LoRA+, on one trunk.
# Usage: bash run_8b_one_trunk.sh ACTOR_MODEL_PATH CRITIC_MODEL_PATH [ACTOR_ZERO_STAGE] [CRITIC_ZERO_STAGE] [OUTPUT] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=llama3/single_gpu/ppo_8b_one_trunk.yaml
take "ACTOR_MODEL_PATH:the folder that step 1 wrote" "CRITIC_MODEL_PATH:the folder that step 2 wrote" \
  ACTOR_ZERO_STAGE= CRITIC_ZERO_STAGE= OUTPUT=./output -- "$@"
start
