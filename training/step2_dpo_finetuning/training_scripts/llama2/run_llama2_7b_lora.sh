#!/usr/bin/env bash
# DPO on all GPUs of one machine: Llama-2-7B with LoRA+.
# Usage: bash run_llama2_7b_lora.sh [OUTPUT] [ZERO_STAGE] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../launch.sh"

RECIPE=llama2/single_node/dpo_7b_lora.yaml
take OUTPUT=./output_step2_llama_7b_epoch1_lr9.65e-6 ZERO_STAGE= -- "$@"
start
