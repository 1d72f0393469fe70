#!/usr/bin/env bash
# Step 1 on all GPUs of one machine: OPT-1.3B, all weights.
# Usage: bash run_1.3b.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=opt/single_node/sft_1.3b.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start --enable_tensorboard --tensorboard_path "$OUTPUT"
