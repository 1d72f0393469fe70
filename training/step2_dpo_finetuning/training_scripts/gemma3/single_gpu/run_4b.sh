#!/usr/bin/env bash
# DPO on one GPU: Gemma-3-4B-it with LoRA+.
# Usage: bash run_4b.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=gemma3/single_gpu/dpo_4b.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
