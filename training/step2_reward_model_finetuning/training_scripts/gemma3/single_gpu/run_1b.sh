#!/usr/bin/env bash
# Step 2 on one GPU: Gemma-3-1B-it with LoRA+.
# Usage: bash run_1b.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=gemma3/single_gpu/reward_1b.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
