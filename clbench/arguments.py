"""Types of command-line arguments that several commands share. Standard library only."""

from __future__ import annotations

import argparse
import re

from clbench.errors import UserError


def whole(text: str) -> int:
    """A whole number in decimal digits, for a flag."""
    if re.fullmatch("[+-]?[0-9]{1,1000}", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def numbers(text: str) -> list[int]:
    """Different numbers from 0 up, separated by commas; UserError for anything else."""
    found = text.split(",")
    if not all(re.fullmatch("[0-9]{1,6}", n) for n in found) or len(set(map(int, found))) < len(found):
        raise UserError(f"'{text}' is not a list of different numbers, as in 0,1,2.")
    return [int(n) for n in found]
