#!/usr/bin/env bash
# From a fresh clone to a comparison: environment, demonstrations, base, seqfft / er / clare, matrices, report.
#
#   scripts/quickstart.sh            about ten minutes on two cores, most of it training and evaluation
#   scripts/quickstart.sh --pixels   the same with a policy that sees, in under an hour (docs/cameras.md); needs OpenGL
#   scripts/quickstart.sh --smoke    either of them with almost no training: shows that it runs
#
# When started again, it continues where it stopped and repeats nothing that is finished.
set -euo pipefail

experiment=quickstart stream=metaworld_quick smoke=
for argument in "$@"; do
    case $argument in
        --smoke) smoke=_smoke ;;
        --pixels) experiment=quickstart_pixels stream=metaworld_pixels ;;
        -h | --help)
            sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *)
            echo "quickstart.sh: unknown argument '$argument' (-h shows what there is)" >&2
            exit 2
            ;;
    esac
done

# shellcheck source=scripts/bootstrap.sh
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"
clbench_bootstrap
cd "$CLBENCH_ROOT"

echo "== 1/2 demonstrations (Meta-World's scripted experts in MuJoCo) =="
"$CLBENCH_PYTHON" -P -m clbench.cli data make "$stream"
echo "== 2/2 base, training, evaluation, report =="
"$CLBENCH_PYTHON" -P -m clbench.cli sweep "$experiment$smoke"
