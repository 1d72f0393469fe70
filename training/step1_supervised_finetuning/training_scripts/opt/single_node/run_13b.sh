#!/usr/bin/env bash
# Step 1 on all GPUs of one machine: OPT-13B with LoRA+.
# Usage: bash run_13b.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=opt/single_node/sft_13b.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
