#!/usr/bin/env bash
# DPO on all GPUs of one machine: one run of the sweep. OFFLOAD is true or false.
# Usage: bash run_single.sh [ZERO_STAGE] [OFFLOAD] [OUTPUT] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../../launch.sh"

take ZERO_STAGE=0 OFFLOAD=false OUTPUT=./output -- "$@"
RECIPE=opt/single_node/dpo_350m.yaml
if asked OFFLOAD; then start --offload; else start; fi
