#!/usr/bin/env bash
# Step 1 on all GPUs of one machine: one run of the sweep. OFFLOAD and LORA are true or false.
# Usage: bash run_single.sh [ZERO_STAGE] [OFFLOAD] [LORA] [OUTPUT] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../../launch.sh"

take ZERO_STAGE=2 OFFLOAD=false LORA=false OUTPUT=./output -- "$@"
RECIPE=opt/single_node/sft_1.3b.yaml
FLAGS=(--weight_decay 0)
if asked LORA; then RECIPE=opt/single_node/sft_1.3b_lora.yaml; fi
if asked OFFLOAD; then FLAGS+=(--offload); fi
start "${FLAGS[@]}"
