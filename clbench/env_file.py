"""The variables of .env, which the `clbench` command reads with the rules of scripts/bootstrap.sh (`_clb_load_env`).

A line is KEY=VALUE, with or without `export` before it; any other line counts as a comment. Nothing is evaluated. A
value may be in single or double quotes, which end it; without them it ends before white space and "#". `~/` at the
beginning of a value is the home directory. Variables that are already set win, the first line for a name wins, and
empty values set nothing.

Both readers work on bytes, as in the C locale, and a test compares them. Only the standard library is imported here:
what other modules read at import has to be set before.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from clbench.errors import UserError
from clbench.paths import PROJECT_ROOT

VARIABLE = "CLBENCH_ENV_FILE"
_LINE = re.compile(rb"[ \t\v\f\r]*(?:export[ \t\v\f\r]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_QUOTED = re.compile(rb"\"([^\"]*)\"|'([^']*)'")
_COMMENT = re.compile(rb"[ \t\v\f\r]#")


def env_file() -> Path | None:
    """.env of the checkout that clbench runs from, or the file that $CLBENCH_ENV_FILE names; None if there is none.

    Raises:
        UserError: $CLBENCH_ENV_FILE names a file that cannot be read. Empty, it means none.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        in_checkout = (PROJECT_ROOT / "scripts" / "bootstrap.sh").is_file()
        file = PROJECT_ROOT / ".env"
        return file if in_checkout and _readable(file) else None
    if named and not _readable(Path(named)):
        raise UserError(f"{VARIABLE}={named} is not a readable file. Unset it to use the project's .env.")
    return Path(named) if named else None


def _readable(file: Path) -> bool:
    return file.is_file() and os.access(file, os.R_OK)


def read_env_file(file: Path) -> dict[str, str]:
    """Read the variables of a file; those without a value are left out."""
    home = os.fsencode(os.environ.get("HOME", os.path.expanduser("~")))
    found: dict[str, str] = {}
    for line in file.read_bytes().replace(b"\0", b"").split(b"\n"):
        match = _LINE.fullmatch(line.removesuffix(b"\r"))
        if match is None:
            continue
        key, value = match[1], match[2]
        quoted = _QUOTED.match(value)
        if quoted is not None:
            value = quoted[1] if quoted[1] is not None else quoted[2]
        elif value.startswith(b"#"):
            value = b""
        else:
            value = _COMMENT.split(value, maxsplit=1)[0].rstrip()
        if value.startswith(b"~/"):
            value = home + value[1:]
        if value:
            found.setdefault(os.fsdecode(key), os.fsdecode(value))
    return found


def load_env_file() -> None:
    """Set the variables of `env_file` that are not set yet, for this process and its children."""
    file = env_file()
    if file is not None:
        for key, value in read_env_file(file).items():
            os.environ.setdefault(key, value)
