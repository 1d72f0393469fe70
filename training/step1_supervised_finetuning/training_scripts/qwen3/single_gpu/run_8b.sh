#!/usr/bin/env bash
# Step 1 on one GPU: Qwen3-8B with LoRA+.
# Usage: bash run_8b.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=qwen3/single_gpu/sft_8b.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
