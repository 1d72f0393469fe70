#!/usr/bin/env bash
# Step 1 on one GPU: OPT-6.7B with LoRA+.
# Usage: bash run_6.7b_lora.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=opt/single_gpu/sft_6.7b_lora.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
