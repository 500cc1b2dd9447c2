#!/usr/bin/env python3
"""Compute the statistics that policies are normalised by, and write them into a file, or into runs that lack them.

    python3 scripts/compute_dataset_statistics.py --config metaworld_quick --out stats.json
    python3 scripts/compute_dataset_statistics.py --config RUN --repair

Any python3 will do: where it cannot run clbench, the project's own environment (.venv) takes over.
"""

from __future__ import annotations

import importlib.util
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
TAKEN_OVER = "CLBENCH_STATISTICS_TAKEN_OVER"  # set for the second start, so that there is no third


def main() -> int:
    if sys.version_info < (3, 12) or importlib.util.find_spec("lerobot") is None:
        python = os.path.join(ROOT, ".venv", "bin", "python")
        if TAKEN_OVER not in os.environ and os.access(python, os.X_OK):
            os.environ[TAKEN_OVER] = "1"
            os.execv(python, [python, os.path.realpath(__file__), *sys.argv[1:]])
        print(
            "error: no Python environment with LeRobot was found; run `bash scripts/quickstart.sh` or "
            f"`bash scripts/test.sh` once to make {os.path.join(ROOT, '.venv')}",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, ROOT)
    from clbench.training.statistics import main as statistics_main

    return statistics_main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
