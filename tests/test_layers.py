"""What imports what in clbench is what docs/architecture.md says, and goes one way."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "clbench"
COMMANDS = {"cli", "sweep", "listing", "doctor"}
# `clbench` is what a process that was forked for a command runs.
EXCEPTIONS = {("processes", "cli")}


def part(module: str) -> str:
    """The folder or file right under clbench/ that a module is of; "clbench" for the package itself."""
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def imported(path: Path) -> Iterator[str]:
    """Modules of clbench that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "clbench")
        elif isinstance(node, ast.ImportFrom) and node.module == "clbench":
            yield from (f"clbench.{a.name}" for a in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clbench."):
            yield str(node.module)


def found() -> dict[str, set[str]]:
    """Part of clbench → the other parts that it imports."""
    edges: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        own = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
        edges.setdefault(own, set()).update(part(m) for m in imported(path))
    return {own: others - {own, "clbench", "__version__"} for own, others in edges.items()}


def written() -> dict[str, set[str]]:
    """Folder → folders that it imports, as the page says."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `clbench/(\w+)/` \| (.*?) \|", page, flags=re.M)
    return {folder: set(re.findall(r"`(\w+)`", imports)) for folder, imports in rows}


def test_folders_import_what_the_page_says_and_no_more() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    assert {own: others & folders for own, others in found().items() if own in folders} == written()


def test_files_at_the_top_import_no_folder_and_nothing_imports_a_command() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    for own, others in found().items():
        allowed = {to for source, to in EXCEPTIONS if source == own}
        if own not in folders | COMMANDS:
            assert not others & folders, own
        if own not in COMMANDS:
            assert not others & COMMANDS - allowed, own


def test_nothing_imports_in_a_circle() -> None:
    TopologicalSorter(
        {own: {o for o in others if (own, o) not in EXCEPTIONS} for own, others in found().items()}
    ).prepare()


def test_the_table_names_every_file_at_the_top() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in PACKAGE.glob("*.py"):
        assert path.name in ("__init__.py", "__main__.py") or f"`{path.name}`" in page, path.name
