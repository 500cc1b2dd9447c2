#!/usr/bin/env bash
# Trains a run: one checkpoint per task of a stream.
#
#   scripts/run_cl_train.sh --model dit_dec_tiny --algo clare --dataset metaworld_quick
#
#   --model M        a name under configs/models          (default dit_dec_tiny)
#   --algo A[,B]     one algorithm, or several joined by commas; names: clbench list   (default clare)
#   --dataset D      a stream under configs/datasets      (default metaworld_quick)
#   --seed N         the run's seed                       (default 0)
#   --run-id ID      the run's folder under results/      (default M_A_D_sN)
#   --resume         continue from the newest complete state; if there is none, start afresh and say so
#   --allow-change   with --resume: a key that may differ from what the run was started with
#   --init-from RUN[:K]   start from another run's checkpoint K instead of the stream's base
#   --curves-later   leave the learning curves requested by train.eval_during_training to run_cl_eval.sh
#   --smoke          a few steps per task: shows that the pipeline runs, measures nothing
#   --yaml A B ...   merge these YAML files left to right instead of the three axes
#   --gpus N|IDS     a count (0 = CPU, 1 = one GPU), or ids as in 0,1: one process per GPU
#   --nproc N        N processes on the CPU              (default 1)
#   --strategy S     ddp | zero2, how several processes share the work (default: the model's, else ddp)
#   --port P         port on which the processes meet     (default: a free one)
#   --trust C        let checkpoint, run or policy type C run code from models that it names and download from hubs
#   --debug          show tracebacks
#   -- key=value ... overrides, each with or without leading dashes, e.g. -- train.steps=500 eval.episodes=50
#   -h, --help       this text
#
# Exit status: 0 done, 2 an error described in one message, 75 stopped by a signal and saved: continue with --resume.
# The run's folder contains config.yaml, manifest.json, log.jsonl and checkpoints/. Next: scripts/run_cl_eval.sh
set -euo pipefail

# shellcheck source=scripts/bootstrap.sh
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"
clbench_help "$@"
clbench_bootstrap
exec "$CLBENCH_PYTHON" -P -m clbench.cli train "$@"
