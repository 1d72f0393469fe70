#!/usr/bin/env bash
# A command of this repository on several machines under Slurm, requeued until it is done.
# Usage: sbatch [options of sbatch] training/cluster/slurm.sh COMMAND ...
#
#   sbatch training/cluster/slurm.sh bash training/step1_supervised_finetuning/training_scripts/opt/multi_node/run_66b.sh \
#     /shared/sft 3 --save_steps 200 --resume
#   sbatch --nodes 4 training/cluster/slurm.sh python e2e_rlhf.py --deployment-type multi_node \
#     --actor-model 66b --reward-model 350m --output-dir /shared/out --save-steps 200 --resume
#
# Scripts start main.py by LAUNCHER, here `srun`: one task for each GPU of each machine. Five minutes
# before the time limit Slurm sends USR1; the run saves a checkpoint and ends with 75, and the job
# goes back into the queue. The command ends in --resume, so its next start goes on there.
# Submit it from the checkout, in the environment that it is to run in.
#
#SBATCH --job-name dschat
#SBATCH --nodes 2
#SBATCH --ntasks-per-node 8
#SBATCH --gpus-per-node 8
#SBATCH --time 12:00:00
#SBATCH --signal B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode append
set -euo pipefail

if [ $# = 0 ]; then
  echo "error: slurm.sh: COMMAND is missing: give a training script and its arguments" >&2
  exit 2
fi

# Each task sees all GPUs of its machine and takes that of its number; one that fails ends all.
export LAUNCHER="${LAUNCHER:-srun --kill-on-bad-exit=1 --gpu-bind=none python}"

"$@" &
RUN=$!
SIGNALS=0
pass_on() {
  SIGNALS=$((SIGNALS + 1))
  kill -s USR1 "$RUN" 2> /dev/null || true
}
trap pass_on USR1 TERM

while :; do # a signal ends the waiting, not the run
  seen="$SIGNALS" code=0
  wait "$RUN" || code=$?
  [ "$seen" != "$SIGNALS" ] || break
done
if [ "$code" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
