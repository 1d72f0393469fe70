#!/usr/bin/env bash
# Step 1 on several machines: OPT-66B with LoRA+.
# Usage: bash run_66b.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=opt/multi_node/sft_66b.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
