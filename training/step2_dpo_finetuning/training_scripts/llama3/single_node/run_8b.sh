#!/usr/bin/env bash
# DPO on all GPUs of one machine: Llama-3-8B-Instruct with LoRA+.
# Usage: bash run_8b.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../launch.sh"

RECIPE=llama3/single_node/dpo_8b.yaml
take OUTPUT=./output ZERO_STAGE= -- "$@"
start
