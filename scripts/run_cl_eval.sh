#!/usr/bin/env bash
# Evaluates a run in its simulators: the T×T matrix of success rates. Without a simulator (dataset.env: null): the T×T
# matrix of action errors on the episodes that the stream holds out. Finished episodes are never run again.
#
#   scripts/run_cl_eval.sh --run-id dit_dec_tiny_clare_metaworld_quick_s0
#
#   --run-id RUN     the run, by id or folder
#   --trials N       episodes per cell (default: the run's eval.episodes, 20; use 50 for a paper)
#   --cells C        full (T×T, the default), lower (k >= j), last (final row), diagonal
#   --last-only      the same as --cells last
#   --rows K,K       a share of the work: only these checkpoints' cells, counted from 0. Several shares may run at once,
#                    on machines that see the same folder; the command without --rows then writes the matrix
#   --curves         only learning curves, from the weights that training kept (train.eval_during_training=N or
#                    train.keep_weights_every_steps=N)
#   --follow         with --curves: alongside a training run, until it is complete
#   --step S         the matrix after S steps of each task, from train.keep_weights_every_steps, into eval/steps
#   --views V,V      also evaluate the policy blind (cameras show their mean image), deaf (another task's instruction),
#                    or in a view of the algorithm, into eval/views
#   --base           also evaluate the base before the stream (needed for fwt_gem)
#   --random         also evaluate uniformly random actions
#   --workers N      processes (default: one per core, at most 2)
#   --gpus N         1 = the policy runs on a GPU, 0 = on the CPU
#   --output-base D  write D/RUN/eval instead of into the run's folder
#   --trust C        let checkpoint or run C run code from models that it names and download from hubs
#   --debug          show tracebacks
#   -- key=value ... overrides of the eval section, e.g. -- eval.slots=16, or -- eval.split=validation for episodes
#                    used to make choices, which are kept apart from the reported ones, in eval/validation
#   -h, --help       this text
#
# Exit status: 0 done; 2 the message says what is wrong (including simulators that failed repeatedly);
# 75 stopped by SIGTERM or SIGINT. The same command continues after any of them, and after kill -9.
#
# Next: scripts/compute_cl_matrix_metrics.py results/RUN, and clbench report RUN [RUN ...]
set -euo pipefail

# shellcheck source=scripts/bootstrap.sh
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"
clbench_help "$@"
clbench_bootstrap
exec "$CLBENCH_PYTHON" -P -m clbench.cli eval "$@"
