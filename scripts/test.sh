#!/usr/bin/env bash
# Runs the tests: scripts/test.sh [arguments of pytest]
#
#   scripts/test.sh                          all except those marked slow or gpu, two at a time
#   scripts/test.sh --quick                  those that take two minutes in total: no training, no simulators
#   scripts/test.sh tests/test_metrics.py -x
#   scripts/test.sh -m slow                  the slow ones (-m replaces the default selection)
#   scripts/test.sh -n 0 --pdb -k name       in one process, under the debugger
#
# The exit code is pytest's. No network is used once the environment exists.
set -euo pipefail

case ${1:-} in
    -h | --help)
        sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac

# shellcheck source=scripts/bootstrap.sh
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"
clbench_bootstrap
cd "$CLBENCH_ROOT"

# One thread per process: two processes are faster than two threads, and the order of sums stays fixed.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMEXPR_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=disabled

workers=(-n 2 --dist loadgroup) # tests that share something costly stay in one process (xdist_group)
arguments=()
for argument in "$@"; do
    case $argument in
        --quick)
            arguments+=(-m "not gpu and not slow and not long")
            continue
            ;;
        -n | -n[0-9]* | -nauto | --numprocesses* | --pdb | --trace | -s | --capture=no) workers=() ;;
    esac
    arguments+=("$argument")
done

exec "$CLBENCH_PYTHON" -m pytest ${workers[@]+"${workers[@]}"} ${arguments[@]+"${arguments[@]}"}
