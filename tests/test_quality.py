"""The linter and the type checker are part of the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> None:
    """Runs a Python tool in the project's root and fails with all that it printed."""
    command = [sys.executable, "-m", *arguments]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert result.returncode == 0, f"{' '.join(arguments)}\n{result.stdout}{result.stderr}"


def test_ruff() -> None:
    folders = [name for name in ("clbench", "scripts", "tests", "benchmarks") if (ROOT / name).is_dir()]
    run("ruff", "check", "--output-format", "concise", *folders)


def test_mypy() -> None:
    run("mypy")  # files and rules are in pyproject.toml; its cache (.mypy_cache) makes the second run quick


@pytest.mark.xdist_group("one")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests anyway")
def test_tests_that_share_something_stay_in_one_process(request: pytest.FixtureRequest) -> None:
    """pytest and pytest-xdist have to fit each other: otherwise costly fixtures are set up in every process."""
    assert request.node.nodeid.endswith("@one")
