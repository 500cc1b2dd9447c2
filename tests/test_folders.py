"""Folders of configurations: the user's, plugins' and clbench's own, in that order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clbench.config import folders
from clbench.config.compose import compose
from clbench.errors import UserError

MODEL = "# Of mine.\npolicy: {type: dit_dec, d_model: 64}\n"


def write(folder: Path, name: str, text: str = MODEL) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def install(site: Path, name: str) -> Path:
    """A distribution whose package may not be imported; returns its folder of configurations."""
    package = site / name
    (package / "configs").mkdir(parents=True)
    (package / "__init__.py").write_text('raise RuntimeError("imported")\n')
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[clbench.configs]\n{name} = {name}.configs\n")
    return package / "configs"


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory elsewhere, and a folder `site` on the search path."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLBENCH_CONFIG_PATH", raising=False)
    folders.forget()
    yield tmp_path
    folders.forget()


def composed(model: str) -> tuple[int, str]:
    config, files = compose(model=model, algorithms=["seqfft"], dataset="metaworld_quick")
    return config.policy["d_model"], files[1]


def test_the_first_folder_counts_and_the_start_line_says_which(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert composed("dit_dec_tiny") == (128, "configs/models/dit_dec_tiny.yaml")
    plugin = install(away / "site", "plug")
    write(plugin, "models/dit_dec_tiny.yaml", MODEL.replace("64", "32"))
    folders.forget()
    assert composed("dit_dec_tiny") == (32, "plug 1.0: models/dit_dec_tiny.yaml")
    for name, width in (("second", "8"), ("first", "16")):
        write(away / name, "models/dit_dec_tiny.yaml", MODEL.replace("64", width))
    monkeypatch.setenv("CLBENCH_CONFIG_PATH", os.pathsep.join(("first", str(away / "second"), "")))
    assert composed("dit_dec_tiny") == (16, "first/models/dit_dec_tiny.yaml")
    write(away / "configs", "models/dit_dec_tiny.yaml")
    assert composed("dit_dec_tiny") == (64, "./configs/models/dit_dec_tiny.yaml")
    assert [f.origin for f in folders.folders()] == ["./configs", "first", str(away / "second"), "plug 1.0", "clbench"]
    assert "plug" not in sys.modules


def test_two_plugins_with_one_name_are_refused_unless_the_user_decides(away: Path) -> None:
    for name in ("plug", "other"):
        write(install(away / "site", name), "models/wide.yaml")
    folders.forget()
    with pytest.raises(UserError, match=r"models/wide\.yaml is provided by other 1\.0 and by plug 1\.0\. Uninstall"):
        composed("wide")
    assert composed("dit_dec_tiny")[0] == 128  # nobody asked for it
    write(away / "configs", "models/wide.yaml")
    assert composed("wide") == (64, "./configs/models/wide.yaml")


def test_the_checkouts_own_folder_is_not_the_users(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders.SHIPPED.parent)
    monkeypatch.setenv("CLBENCH_CONFIG_PATH", str(folders.SHIPPED))
    assert [f.origin for f in folders.folders()] == ["clbench"]


def test_what_is_no_folder_is_said(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_CONFIG_PATH", "/nowhere/at/all")
    with pytest.raises(UserError, match="CLBENCH_CONFIG_PATH names /nowhere/at/all, which is not a folder"):
        folders.folders()
    monkeypatch.delenv("CLBENCH_CONFIG_PATH")
    (install(away / "site", "plug").parent / "configs").rmdir()
    folders.forget()
    with pytest.raises(UserError, match=r"plug 1\.0: the entry point 'plug' of clbench\.configs names plug\.configs"):
        folders.folders()


@pytest.mark.parametrize("name", ["../models/dit_dec_tiny", "/etc/hosts", "sub/dit_dec_tiny", ".."])
def test_a_name_never_leads_out_of_a_folder(name: str) -> None:
    assert folders.find("models", name) is None
