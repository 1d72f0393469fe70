#!/usr/bin/env bash
# Answers of a model before and after step 1, side by side.
# Usage: bash run_prompt.sh BASELINE FINETUNED [more flags of prompt_eval.py]
set -euo pipefail

STEP_DIR="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
BASELINE="${1:?the model before fine-tuning}"
FINETUNED="${2:?the folder that step 1 wrote}"
shift 2

python "$STEP_DIR/prompt_eval.py" \
  --model_name_or_path_baseline "$BASELINE" \
  --model_name_or_path_finetune "$FINETUNED" \
  "$@"
