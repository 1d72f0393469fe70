#!/usr/bin/env bash
# Step 2 on one GPU: Llama-3-8B-Instruct with LoRA+.
# Usage: bash run_8b.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=llama3/single_gpu/reward_8b.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
