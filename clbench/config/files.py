"""Reading one configuration file, which is treated as hostile: no tags, no aliases, no ${…} (docs/security.md)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf.errors import OmegaConfBaseException

from clbench.config import folders
from clbench.config.reading import clip, read_sections, read_yaml
from clbench.config.schema import Config
from clbench.errors import UserError
from clbench.io import read_text

MAX_YAML_BYTES = 256 * 1024
# What OmegaConf, its parsers and Python's conversions raise for values that do not fit; 10**5000 is a ValueError.
INVALID = (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, IndexError, AttributeError, OverflowError,
           RecursionError)  # fmt: skip


def load_yaml(path: Path | str, schema: type = Config) -> dict[str, Any]:
    """Read one YAML mapping whose keys are those of a dataclass.

    Raises:
        UserError: it is missing, too large, not YAML, not a mapping, or holds what a configuration file may not: tags,
            aliases, ${…}, a duplicate key, more than MAX_DEPTH levels, unknown keys, values of the wrong type.
    """
    return _load(Path(path), lambda text, source: read_yaml(text, schema, source))


def load_text(text: str, source: str) -> dict[str, Any]:
    """Read the text of a YAML mapping that comes from `source`. Raises as `load_yaml`."""
    try:
        return read_yaml(text, Config, source)
    except UserError:
        raise
    except INVALID as e:
        raise UserError(f"{source} is not valid YAML: {one_line(e)}") from e


def load_sections(path: Path, schema: type, reserved: dict[str, Any]) -> dict[str, Any]:
    """Read one YAML mapping of names to sections, each with the keys of a dataclass; `reserved`: keys that are not such
    names, with their types. Raises as `load_yaml`."""
    return _load(path, lambda text, source: read_sections(text, schema, reserved, source))


def _load(path: Path, read: Callable[[str, str], dict[str, Any]]) -> dict[str, Any]:
    text = read_text(path, MAX_YAML_BYTES)
    try:
        return read(text, folders.shown(path))
    except UserError:
        raise
    except INVALID as e:
        raise UserError(f"{path} is not valid YAML: {one_line(e)}") from e


def one_line(e: BaseException) -> str:
    """A library's message about a value, without the library's own terms."""
    text = " ".join(str(e).split("full_key:")[0].split()) or type(e).__name__
    if re.search(r"\b(\w+Config|\w+Node|OmegaConf|Optional)\b", text):  # a library's terms
        text = "a value of the wrong type for its key"
    return clip(text)
