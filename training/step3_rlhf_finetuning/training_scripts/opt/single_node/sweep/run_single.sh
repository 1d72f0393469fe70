#!/usr/bin/env bash
# Step 3 on all GPUs of one machine: one run of the sweep. OFFLOAD, LORA and TEST are true or false;
# with TEST it stops after TEST_STOP_STEP iterations. The two arguments about DeepSpeed's kernels and
# its mixed precision are taken, and main.py says that they do nothing.
# Usage: bash run_single.sh ACTOR_MODEL_PATH CRITIC_MODEL_PATH [ACTOR_ZERO_STAGE] [CRITIC_ZERO_STAGE] [ENABLE_HYBRID_ENGINE] [OFFLOAD] [LORA] [MIXED_PRECISION_LORA] [OUTPUT] [TEST] [TEST_STOP_STEP] [more flags of main.py, which win over the recipe]
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../../../../launch.sh"

take "ACTOR_MODEL_PATH:the folder that step 1 wrote" "CRITIC_MODEL_PATH:the folder that step 2 wrote" \
  ACTOR_ZERO_STAGE=2 CRITIC_ZERO_STAGE=2 ENABLE_HYBRID_ENGINE=false OFFLOAD=false LORA=false \
  MIXED_PRECISION_LORA=false OUTPUT=./output TEST=false TEST_STOP_STEP=5 -- "$@"
RECIPE=opt/single_node/ppo_1.3b_sweep.yaml
FLAGS=(--print_answers)
if asked LORA; then RECIPE=opt/single_node/ppo_1.3b_lora.yaml; fi
if asked OFFLOAD; then FLAGS+=(--offload); fi
if asked ENABLE_HYBRID_ENGINE; then FLAGS+=(--enable_hybrid_engine); fi
if asked MIXED_PRECISION_LORA; then FLAGS+=(--enable_mixed_precision_lora); fi
if asked TEST; then FLAGS+=(--enable_test_mode --test_stop_step "$TEST_STOP_STEP"); fi
start "${FLAGS[@]}"
