#!/usr/bin/env python3
"""Print every continual-learning metric of a run, its eval folder, or a success matrix as JSON, CSV, .npy or .npz.

    python3 scripts/compute_cl_matrix_metrics.py results/RUN
    python3 scripts/compute_cl_matrix_metrics.py matrix.csv --json

Any python3 will do: where it cannot run clbench, the project's own environment (.venv) takes over.
"""

from __future__ import annotations

import importlib.util
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
TAKEN_OVER = "CLBENCH_METRICS_TAKEN_OVER"  # set for the second start, so that there is no third


def main() -> int:
    if sys.version_info < (3, 12) or importlib.util.find_spec("numpy") is None:
        python = os.path.join(ROOT, ".venv", "bin", "python")
        if TAKEN_OVER not in os.environ and os.access(python, os.X_OK):
            os.environ[TAKEN_OVER] = "1"
            os.execv(python, [python, os.path.realpath(__file__), *sys.argv[1:]])
        print(
            "error: no Python environment with numpy was found; run `bash scripts/quickstart.sh` or "
            f"`bash scripts/test.sh` once to make {os.path.join(ROOT, '.venv')}",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, ROOT)
    from clbench.env_file import load_env_file
    from clbench.errors import UserError

    try:
        load_env_file()  # runs may be elsewhere: CLBENCH_RESULTS_ROOT
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    from clbench.metrics.cli import main as metrics_main

    return metrics_main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
