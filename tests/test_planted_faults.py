"""The tests catch a wrong method: every planted fault turns at least one of them red."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from clbench.registry import ALGORITHMS
from tests.planted_faults import FAULTS, Fault, table

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.label)
def test_the_text_that_a_fault_replaces_is_there_once(fault: Fault) -> None:
    text = (ROOT / "clbench" / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.right) == 1
    compile(text.replace(fault.right, fault.wrong), fault.file, "exec")


def test_every_method_has_three() -> None:
    counts = Counter(f.method for f in FAULTS)
    assert set(counts) == set(ALGORITHMS) and min(counts.values()) >= 3


def test_the_page_lists_them() -> None:
    page = (ROOT / "docs" / "REPRODUCIBILITY.md").read_text(encoding="utf-8")
    assert table() in page, "put the output of tests/planted_faults.table() into docs/REPRODUCIBILITY.md"


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.label)
def test_a_fault_turns_a_test_red(fault: Fault, tmp_path: Path) -> None:
    for name in ("clbench", "tests", "configs", "docs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    path = tmp_path / "clbench" / fault.file
    path.write_text(path.read_text(encoding="utf-8").replace(fault.right, fault.wrong), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *fault.tests]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 1, f"{fault.label}: no test fails\n{run.stdout[-3000:]}{run.stderr[-1000:]}"
    assert " failed" in run.stdout or " error" in run.stdout
