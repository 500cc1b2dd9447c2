"""Printing. Names and texts from files may hold escape sequences: none reaches the terminal.

Everything that the package prints goes through `show` and `tell`; a test enforces this. Standard library only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def printable(text: object) -> str:
    """The text on one line: control and direction characters, including line breaks, become spaces."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def show(*lines: object) -> None:
    """Print results on stdout, each argument as one `printable` line."""
    print("\n".join(map(printable, lines)), flush=True)


def tell(*lines: object) -> None:
    """`show` on stderr: progress, notes, warnings and errors."""
    print("\n".join(map(printable, lines)), file=sys.stderr, flush=True)


def last_line(log: Path) -> str:
    """The last non-empty line of a command's output."""
    with log.open("rb") as f:
        f.seek(max(0, os.fstat(f.fileno()).st_size - 4096))
        lines = f.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    return printable(next((line.strip() for line in reversed(lines) if line.strip()), ""))
