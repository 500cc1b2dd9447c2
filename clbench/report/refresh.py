"""Regenerates pages of results from packed records (scripts/refresh_results.sh)."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from clbench.errors import UserError
from clbench.evaluation.packed import unpacked
from clbench.io import read_text, write_text
from clbench.report.build import build_report
from clbench.terminal import show, tell

RECORDS = "records.tar.xz"
BLOCKS = {"table": "table.md", "paired": "paired.md"}  # in a page → a file of the report


def refresh(page: Path) -> list[str]:
    """Renew the tables and pictures of one page from its records; returns the names of the files that changed.

    Raises:
        UserError: it has no records, or README.md has a block whose table the report lacks.
    """
    if not (page / RECORDS).is_file():
        raise UserError(f"{page} has no {RECORDS}: pack the runs that it shows (clbench results pack).")
    changed = []
    with tempfile.TemporaryDirectory(prefix="clbench-page-") as name, unpacked([page / RECORDS]) as runs:
        command = f"scripts/refresh_results.sh {page.name}"
        report = build_report(runs, Path(name), name=page.name, command=command).parent
        for picture in sorted(page.glob("*.png")):
            new = report / picture.name
            if new.is_file() and new.read_bytes() != picture.read_bytes():
                shutil.copyfile(new, picture)
                changed.append(picture.name)
        text = before = read_text(page / "README.md")
        for block, file in BLOCKS.items():
            text = _replaced(text, block, report / file, page)
    if text != before:
        write_text(page / "README.md", text)
        changed.append("README.md")
    return changed


def _replaced(text: str, block: str, file: Path, page: Path) -> str:
    """The page's text with the block's contents replaced by the file's; unchanged if it has no such block."""
    pattern = re.compile(rf"(<!-- {block} -->\n).*?(<!-- /{block} -->)", re.S)
    if not pattern.search(text):
        return text
    if not file.is_file():
        raise UserError(f"{page / 'README.md'} has a block '{block}', but the report of its runs has no {file.name}.")
    new = read_text(file)
    return pattern.sub(lambda m: f"{m[1]}{new}{m[2]}", text)


def main(argv: Sequence[str]) -> int:
    """`argv`: the folder of all pages, then names of pages (none = all that have records)."""
    pages, names = Path(argv[0]).resolve(), list(argv[1:])
    try:
        for name in names or sorted(p.parent.name for p in pages.glob(f"*/{RECORDS}")):
            changed = refresh(pages / name)
            show(f"{name}: {', '.join(changed) or 'nothing has changed'}")
    except UserError as e:
        tell(f"clbench: {e}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
