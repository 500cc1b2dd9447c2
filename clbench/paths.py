"""Where things are: the data, model, results and cache roots, which environment variables can move.

In a checkout they are in the project. A wheel has no project: they are then in the working directory (the cache in the
user's cache), and nothing is written where the package is installed.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
PROJECT_ROOT = PACKAGE.parent
INSTALLED = (PACKAGE / "configs").is_dir()  # from a wheel, which contains the configurations


def _root(variable: str, default: str) -> Path:
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else (Path.cwd() if INSTALLED else PROJECT_ROOT) / default


def data_root() -> Path:
    """Demonstrations: $CLBENCH_DATA_ROOT, else data/."""
    return _root("CLBENCH_DATA_ROOT", "data")


def model_root() -> Path:
    """Checkpoints to start from, by name: $CLBENCH_MODEL_ROOT, else models/."""
    return _root("CLBENCH_MODEL_ROOT", "models")


def named_folder(name: str, root: Path) -> Path:
    """A bare name is a folder in `root`; anything with a slash is a path."""
    return Path(name).expanduser() if "/" in name else root / name


def results_root() -> Path:
    """Runs and reports: $CLBENCH_RESULTS_ROOT, else results/."""
    return _root("CLBENCH_RESULTS_ROOT", "results")


def cache_root() -> Path:
    """What can be regenerated: $CLBENCH_CACHE_ROOT, else .cache/ in the project, or clbench/ in the user's cache."""
    if INSTALLED and not os.environ.get("CLBENCH_CACHE_ROOT"):
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clbench"
    return _root("CLBENCH_CACHE_ROOT", ".cache")


def bases_root() -> Path:
    """Pretrained bases, each in a folder named by what it depends on."""
    return cache_root() / "bases"
