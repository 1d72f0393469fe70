#!/usr/bin/env bash
# Step 2 on several machines: OPT-350M, all weights.
# Usage: bash run_350m.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=opt/multi_node/reward_350m.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
