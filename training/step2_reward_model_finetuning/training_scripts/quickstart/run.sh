#!/usr/bin/env bash
# Step 2 on one GPU or on the CPU, sized for the embedded default: all weights of the model of step 1.
# Usage: bash run.sh MODEL DATA [OUTPUT] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../launch.sh"

RECIPE=quickstart/reward.yaml
take "MODEL:the folder that step 1 wrote" "DATA:a data file or folder" OUTPUT=./output -- "$@"
start --model_name_or_path "$MODEL" --data_path "$DATA" --data_output_path "$OUTPUT/.data"
