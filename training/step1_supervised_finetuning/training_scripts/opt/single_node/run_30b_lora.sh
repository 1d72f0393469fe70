#!/usr/bin/env bash
# Step 1 on all GPUs of one machine: OPT-30B with LoRA+.
# Usage: bash run_30b_lora.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=opt/single_node/sft_30b_lora.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
