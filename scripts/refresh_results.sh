#!/usr/bin/env bash
# Regenerates the tables and pictures in docs/results from the packed records next to them: for every page with a
# records.tar.xz, or for the pages named. Run it after changing a metric, an interval or a figure.
#
#   scripts/refresh_results.sh [PAGE ...]      e.g. scripts/refresh_results.sh quickstart
#
# In a page's README.md, the text between <!-- table --> and <!-- /table --> is replaced by the table of its runs, and
# that between <!-- paired --> and <!-- /paired --> by the table of their paired differences. Pictures on the page are
# replaced by the report's pictures of the same names. To renew the records themselves, train again and pack:
#
#   clbench sweep quickstart && clbench results pack results/quickstart_* --out docs/results/quickstart/records.tar.xz
#
#   -h, --help       this text
set -euo pipefail

# shellcheck source=scripts/bootstrap.sh
source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"
clbench_help "$@"
clbench_bootstrap
exec "$CLBENCH_PYTHON" -P -m clbench.report.refresh "$(dirname "${BASH_SOURCE[0]}")/../docs/results" "$@"
