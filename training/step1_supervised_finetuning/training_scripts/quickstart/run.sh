#!/usr/bin/env bash
# Step 1 on one GPU or on the CPU, sized for the embedded default: a small model learns to answer.
# Usage: bash run.sh MODEL DATA [OUTPUT] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../launch.sh"

RECIPE=quickstart/sft.yaml
take "MODEL:a model folder or hub id" "DATA:a data file or folder" OUTPUT=./output -- "$@"
start --model_name_or_path "$MODEL" --data_path "$DATA" --data_output_path "$OUTPUT/.data"
