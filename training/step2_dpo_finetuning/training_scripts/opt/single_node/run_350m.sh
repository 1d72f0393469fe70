#!/usr/bin/env bash
# DPO on all GPUs of one machine: OPT-350M, all weights.
# Usage: bash run_350m.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=opt/single_node/dpo_350m.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
