#!/usr/bin/env bash
# Makes the tables and pictures of docs/results anew from the packed records beside them: for every page with a
# records.tar.xz, or for those named. Run it after a change of a metric, an interval or a figure.
#
#   scripts/refresh_results.sh [PAGE ...]      e.g. scripts/refresh_results.sh quickstart
#
# In a page's README.md, what stands between <!-- table --> and <!-- /table --> becomes the table of its runs, and between
# <!-- paired --> and <!-- /paired --> that of their paired differences. Pictures that the page has are replaced by the
# report's of the same names. To renew the records themselves, train again and pack:
#
#   clbench sweep quickstart && clbench results pack results/quickstart_* --out docs/results/quickstart/records.tar.xz
#
#   -h, --help       this text
set -euo pipefail

for argument in "$@"; do
    case $argument in
        -h | --help)
            sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
    esac
done

# shellcheck source=scripts/bootstrap.sh
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"
clbench_bootstrap
exec "$CLBENCH_PYTHON" -P -m clbench.report.refresh "$(dirname "${BASH_SOURCE[0]}")/../docs/results" "$@"
