"""Streams that code describes: an installed package's function returns what a stream's YAML file would hold.

    [project.entry-points."clbench.streams"]
    my_stream = "my_package.streams:my_stream"

The function has no arguments. A file of that name in a folder of the user's counts before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from clbench import registry
from clbench.config import folders
from clbench.config.files import load_text
from clbench.errors import UserError


class _Dumper(yaml.SafeDumper):
    """Writes what stands in two places twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def find(name: str) -> tuple[Path | None, dict[str, Any] | None]:
    """The file of a stream, or what its code returns; neither where nothing has that name.

    Raises:
        UserError: a file that is not the user's and code both have the name, or the code does not work.
    """
    path = folders.find("datasets", name)
    if name not in registry.names("streams"):
        return path, None
    if path is None:
        return None, described(name)
    folder = folders.holders("datasets", name)[0][0]
    if folder.kind != folders.USER:
        entry = registry.entries("streams")[name]
        raise UserError(
            f"the stream '{name}' is brought by {folder.origin} (datasets/{name}.yaml) and by {entry.origin} "
            f"({entry.target}). Uninstall one of them, or put the one that you mean into ./configs/datasets."
        )
    return path, None


def described(name: str) -> dict[str, Any]:
    """What the code of a stream returns, read as a YAML file with the same contents would be.

    Raises:
        UserError: it cannot be imported, fails, or returns what no such file could hold.
    """
    entry = registry.entries("streams")[name]
    who = f"the stream '{name}' of {entry.origin} ({entry.target})"
    made = registry.load("streams", name)
    try:
        text = yaml.dump(made(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    except Exception as e:
        raise UserError(f"{who} does not describe itself: {type(e).__name__}: {e}") from e
    return load_text(text, who)
