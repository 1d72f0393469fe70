#!/usr/bin/env bash
# DPO on one GPU or on the CPU, of a small model such as that of step 1's quickstart, with LoRA+.
# Usage: bash run.sh MODEL DATA [OUTPUT] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../launch.sh"

RECIPE=quickstart/dpo.yaml
take "MODEL:the folder that step 1 wrote" "DATA:a data file or folder" OUTPUT=./output -- "$@"
start --model_name_or_path "$MODEL" --data_path "$DATA" --data_output_path "$OUTPUT/.data"
