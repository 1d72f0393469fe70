#!/usr/bin/env bash
# Step 1 on all GPUs of one machine: BLOOM-1.1B in Chinese, all weights.
# Usage: bash run_chinese.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../launch.sh"

RECIPE=bloom/single_node/sft_1.1b_chinese.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
