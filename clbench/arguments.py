"""Types of command-line arguments that several commands share. Standard library only."""

from __future__ import annotations

import argparse
import re


def whole(text: str) -> int:
    """A whole number in decimal digits, for a flag."""
    if re.fullmatch("[+-]?[0-9]{1,1000}", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)
