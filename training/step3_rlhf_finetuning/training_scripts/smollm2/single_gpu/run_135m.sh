#!/usr/bin/env bash
# Step 3 on one GPU: a SmolLM2-135M actor and critic with LoRA+.
# Usage: bash run_135m.sh ACTOR_MODEL_PATH CRITIC_MODEL_PATH [ACTOR_ZERO_STAGE] [CRITIC_ZERO_STAGE] [OUTPUT] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=smollm2/single_gpu/ppo_135m.yaml
take "ACTOR_MODEL_PATH:the folder that step 1 wrote" "CRITIC_MODEL_PATH:the folder that step 2 wrote" \
  ACTOR_ZERO_STAGE= CRITIC_ZERO_STAGE= OUTPUT=./output -- "$@"
start
