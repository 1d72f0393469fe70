#!/usr/bin/env bash
# Step 3 on one GPU or on the CPU, sized for the embedded default: PPO, actor and critic with LoRA+.
# Usage: bash run.sh ACTOR_MODEL_PATH CRITIC_MODEL_PATH DATA [OUTPUT] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../launch.sh"

RECIPE=quickstart/ppo.yaml
take "ACTOR_MODEL_PATH:the folder that step 1 wrote" "CRITIC_MODEL_PATH:the folder that step 2 wrote" \
  "DATA:a data file or folder" OUTPUT=./output -- "$@"
start --data_path "$DATA" --data_output_path "$OUTPUT/.data"
