#!/usr/bin/env bash
# Step 3 on all GPUs of one machine: a Llama-3-8B-Instruct actor and critic with LoRA+.
# Usage: bash run_8b.sh ACTOR_MODEL_PATH CRITIC_MODEL_PATH [ACTOR_ZERO_STAGE] [CRITIC_ZERO_STAGE] [OUTPUT] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=llama3/single_node/ppo_8b.yaml
take "ACTOR_MODEL_PATH:the folder that step 1 wrote" "CRITIC_MODEL_PATH:the folder that step 2 wrote" \
  ACTOR_ZERO_STAGE= CRITIC_ZERO_STAGE= OUTPUT=./output -- "$@"
start
