"""What commands print. Names and texts from files may hold escape sequences: none reaches the terminal.

Everything that the package prints goes through `show` and `tell`; a test keeps it so. Standard library only.
"""

from __future__ import annotations

import sys


def printable(text: object) -> str:
    """The text on one line: control and direction characters, line breaks among them, become spaces."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def show(*lines: object) -> None:
    """Print results on stdout, each argument as one `printable` line."""
    print("\n".join(map(printable, lines)), flush=True)


def tell(*lines: object) -> None:
    """`show` on stderr: progress, notes, warnings and errors."""
    print("\n".join(map(printable, lines)), file=sys.stderr, flush=True)
