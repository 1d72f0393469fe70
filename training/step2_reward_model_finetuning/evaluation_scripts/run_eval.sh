#!/usr/bin/env bash
# Accuracy of a reward model and the scores of a few pairs.
# Usage: bash run_eval.sh [MODEL] [more flags of rw_eval.py]
set -euo pipefail

STEP_DIR="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
MODEL="${1:-./output}"
shift "$(($# < 1 ? $# : 1))"

python "$STEP_DIR/rw_eval.py" \
  --model_name_or_path "$MODEL" \
  --num_padding_at_beginning 1 \
  "$@"
