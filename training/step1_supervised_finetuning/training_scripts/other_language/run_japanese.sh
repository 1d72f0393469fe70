#!/usr/bin/env bash
# Step 1 on all GPUs of one machine: mGPT-1.3B in Japanese, all weights.
# Usage: bash run_japanese.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../launch.sh"

RECIPE=mgpt/single_node/sft_1.3b_japanese.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
