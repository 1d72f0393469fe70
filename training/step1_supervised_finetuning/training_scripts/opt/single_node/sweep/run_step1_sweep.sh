#!/usr/bin/env bash
# Step 1 on all GPUs of one machine: OPT-1.3B with every ZeRO stage, offload and LoRA, a folder each.
# Usage: bash run_step1_sweep.sh [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../../launch.sh"

for stage in 0 1 2 3; do
  for offload in true false; do
    [ "$stage:$offload" != 0:true ] || continue # offload needs ZeRO
    for lora in true false; do
      attempt "$stage" "$offload" "$lora" "z${stage}_offload_${offload}_lora_${lora}" "$@"
    done
  done
done
conclude
