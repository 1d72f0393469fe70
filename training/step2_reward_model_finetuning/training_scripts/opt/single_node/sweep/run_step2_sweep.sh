#!/usr/bin/env bash
# Step 2 on all GPUs of one machine: OPT-350M with every ZeRO stage and offload, a folder each.
# Usage: bash run_step2_sweep.sh [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../../launch.sh"

for stage in 0 1 2 3; do
  for offload in true false; do
    [ "$stage:$offload" != 0:true ] || continue # offload needs ZeRO
    attempt "$stage" "$offload" "z${stage}_offload_${offload}" "$@"
  done
done
conclude
