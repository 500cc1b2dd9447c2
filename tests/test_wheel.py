"""The wheel: it carries the configurations, and works away from the checkout without writing where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
PARTS = ("clbench", "configs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
PLACES = (
    "import clbench.paths as p\n"
    "for root in (p.results_root, p.data_root, p.model_root, p.cache_root): print(root())\n"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, for a build leaves folders beside them."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    out = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(source)], source)
    (found,) = out.glob("*.whl")
    return found


def run(command: list[str], cwd: Path, **variables: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_configuration_and_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    kinds = (".json", ".py")
    modules = [p for p in (ROOT / "clbench").rglob("*") if p.suffix in kinds or p.name == "py.typed"]
    wanted = {str(p.relative_to(ROOT)) for p in modules}
    configs = {f"clbench/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*") if p.is_file()}
    assert held == wanted | configs


def test_clbench_works_from_the_wheel_and_writes_nothing_there(wheel: Path, tmp_path: Path) -> None:
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    run([*PIP, "install", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel)], tmp_path)
    before = {p: p.stat().st_mtime_ns for p in site.rglob("*")}
    from_wheel = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(here / "home")}
    for name in ("RESULTS", "DATA", "MODEL", "CACHE"):
        from_wheel[f"CLBENCH_{name}_ROOT"] = ""
    from_wheel["XDG_CACHE_HOME"] = ""
    command = [sys.executable, "-P", "-m", "clbench.cli"]
    listed = run([*command, "list"], here, **from_wheel)
    for name in ("dit_dec_tiny", "clare", "metaworld_cw10", "quickstart"):
        assert name in listed
    assert "quickstart_seqfft_s0" in run([*command, "sweep", "quickstart", "--dry-run"], here, **from_wheel)
    where = run([sys.executable, "-c", PLACES], here, **from_wheel).splitlines()
    assert where == [str(here / "results"), str(here / "data"), str(here / "models"), str(here / "home/.cache/clbench")]
    assert {p: p.stat().st_mtime_ns for p in site.rglob("*")} == before
