"""Streams described by code: an installed package's function returns what a stream's YAML file would hold.

    [project.entry-points."clbench.streams"]
    my_stream = "my_package.streams:my_stream"

The function takes no arguments. A file of that name in one of the user's folders takes precedence.
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
    """Writes shared objects out each time, instead of as aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def find(name: str) -> tuple[Path | None, dict[str, Any] | None]:
    """The file of a stream, or what its code returns; neither if nothing has that name.

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
            f"the stream '{name}' is provided by {folder.origin} (datasets/{name}.yaml) and by {entry.origin} "
            f"({entry.target}). Uninstall one of them, or put the one that you mean into ./configs/datasets."
        )
    return path, None


def described(name: str) -> dict[str, Any]:
    """What the code of a stream returns, read as a YAML file with the same contents would be.

    Raises:
        UserError: it cannot be imported, fails, or returns something that no such file could hold.
    """
    entry = registry.entries("streams")[name]
    who = f"the stream '{name}' of {entry.origin} ({entry.target})"
    made = registry.load("streams", name)
    try:
        text = yaml.dump(made(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    except Exception as e:
        raise UserError(f"{who} cannot be read: {type(e).__name__}: {e}") from e
    return load_text(text, who)
