"""The registry: own names, installed packages', this process's; described without importing anything."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clbench import registry
from clbench.errors import UserError


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution that is installed (its folder is on the path), with a module that must not be imported."""
    (tmp_path / "plug" / "sub").mkdir(parents=True)
    (tmp_path / "plug" / "__init__.py").write_text('raise RuntimeError("imported")\n')
    (tmp_path / "plug" / "sub" / "mine.py").write_text(
        '"""Of the module."""\n\nclass Mine:\n    """Does a thing.\n\n    More.\n    """\n\n'
        '    needs = ("numpy", "no-such-distribution")\n'
    )
    info = tmp_path / "plug-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(
        "[clbench.algorithms]\nmine = plug.sub.mine:Mine\nlost = plug.nowhere:Mine\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("plug", None)


def test_an_installed_package_adds_names_and_nothing_of_it_is_imported(plugin: Path) -> None:
    found = registry.entries("algorithms")
    assert {"mine", "er", "clare"} <= set(found) and list(found) == sorted(found)
    assert found["mine"] == registry.Entry("algorithms", "mine", "plug.sub.mine:Mine", "plug 1.5")
    assert found["er"].origin == "clbench"
    described = registry.describe(found["mine"])
    assert described.text == "Does a thing." and described.needs == ("numpy", "no-such-distribution")
    assert described.missing == ("no-such-distribution",)
    assert registry.describe(found["lost"]).text == ""
    assert "plug" not in sys.modules


def test_what_cannot_be_imported_is_said_with_its_target(plugin: Path) -> None:
    (plugin / "plug" / "__init__.py").write_text("")
    with pytest.raises(UserError, match=r"the algorithm 'lost' \(plug\.nowhere:Mine\) cannot be imported: No module"):
        registry.load("algorithms", "lost")
    assert registry.load("algorithms", "mine").needs[0] == "numpy"


def test_every_own_name_can_be_loaded_and_says_what_it_is() -> None:
    for axis in registry.AXES:
        for name, entry in registry.entries(axis).items():
            text = registry.describe(entry).text
            assert text, f"{axis} {name}"
            assert registry.load(axis, name).__doc__.splitlines()[0] == text


def test_registered_for_this_process() -> None:
    class Here:
        """Says so."""

    registry.register("algorithms", "here", Here)
    try:
        assert registry.load("algorithms", "here") is Here
        entry = registry.entries("algorithms")["here"]
        assert entry.origin == "this process" and registry.describe(entry).text == "Says so."
    finally:
        registry.register("algorithms", "here", None)
    assert "here" not in registry.names("algorithms")
    with pytest.raises(UserError, match="'er' is already taken"):
        registry.register("algorithms", "er", Here)


def test_unknown_names_and_axes_suggest_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown algorithm 'clar'.*Did you mean 'clare'"):
        registry.load("algorithms", "clar")
    with pytest.raises(UserError, match=r"no axis 'algorithm'.*Did you mean 'algorithms'"):
        registry.entries("algorithm")
