"""Where things are: the project's configs, and the data, model, results and cache roots, which variables move."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent
CONFIG_ROOT = PROJECT_ROOT / "configs"


def _root(variable: str, default: str) -> Path:
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else PROJECT_ROOT / default


def data_root() -> Path:
    """Demonstrations: $CLBENCH_DATA_ROOT, else data/ in the project."""
    return _root("CLBENCH_DATA_ROOT", "data")


def model_root() -> Path:
    """Checkpoints to start from, by name: $CLBENCH_MODEL_ROOT, else models/ in the project."""
    return _root("CLBENCH_MODEL_ROOT", "models")


def named_folder(name: str, root: Path) -> Path:
    """A bare name is a folder in `root`; anything with a slash is a path."""
    return Path(name).expanduser() if "/" in name else root / name


def results_root() -> Path:
    """Runs and reports: $CLBENCH_RESULTS_ROOT, else results/ in the project."""
    return _root("CLBENCH_RESULTS_ROOT", "results")


def cache_root() -> Path:
    """What can be made again: $CLBENCH_CACHE_ROOT, else .cache/ in the project."""
    return _root("CLBENCH_CACHE_ROOT", ".cache")


def bases_root() -> Path:
    """Pretrained bases, each in a folder named by what it depends on."""
    return cache_root() / "bases"
