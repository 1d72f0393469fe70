#!/usr/bin/env bash
# Step 2 on one GPU: SmolLM2-1.7B with LoRA+.
# Usage: bash run_1.7b.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=smollm2/single_gpu/reward_1.7b.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
