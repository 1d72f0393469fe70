#!/usr/bin/env bash
# A training script on several machines without a scheduler: torchrun, started on each of them.
# Usage: bash torchrun.sh NODES GPUS FIRST_HOST SCRIPT [arguments of SCRIPT]
#
#   bash training/cluster/torchrun.sh 2 8 node-1 \
#     training/step1_supervised_finetuning/training_scripts/opt/multi_node/run_66b.sh /shared/sft 3 --save_steps 200 --resume
#
# The same line on every machine. torchrun starts the ranks again when one has died, three times.
set -euo pipefail

if [ $# -lt 4 ]; then
  echo "error: torchrun.sh: give NODES GPUS FIRST_HOST SCRIPT" >&2
  exit 2
fi
export LAUNCHER="torchrun --nnodes $1 --nproc_per_node $2 --rdzv_backend c10d --rdzv_endpoint $3:${MASTER_PORT:-29500} --max-restarts 3"
shift 3
exec bash "$@"
