"""One rank of the parity tests: trains every listed run, in the order of the list. Started by tests/test_ranks.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    data, out, strategy, runs = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    from clbench.training.trainer import train
    from tests.toy import toy_config

    for label, section, overrides in runs:
        train(toy_config(Path(data), section, f"output_dir={out}", f"train.strategy={strategy}", *overrides), label)


if __name__ == "__main__":
    main()
