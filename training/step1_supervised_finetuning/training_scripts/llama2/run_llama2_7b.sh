#!/usr/bin/env bash
# Step 1 on all GPUs of one machine: Llama-2-7B, all weights.
# Usage: bash run_llama2_7b.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../launch.sh"

RECIPE=llama2/single_node/sft_7b.yaml
take OUTPUT=./output_step1_llama2_7b ZERO_STAGE= -- "$@"
start
