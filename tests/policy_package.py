"""docs/add_a_policy.md as an installed package, from the page's own blocks."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clbench import processes

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "add_a_policy.md").read_text()
NAME = "lerobot_policy_perceptron"


def blocks(language: str) -> list[str]:
    """The page's blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def write(site: Path, **changes: str) -> Path:
    """Write the package and what an installer writes beside it; `changes`: text in its modules → what replaces it."""
    package = site / NAME
    package.mkdir(parents=True)
    for text in blocks("python"):
        name = text.splitlines()[0].removeprefix("# ")
        for old, new in changes.items():
            text = text.replace(old, new)
        (package / name).write_text(text)
    info = site / f"{NAME}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0.1\n")
    return package


@contextmanager
def installed(site: Path, **changes: str) -> Iterator[Path]:
    """Inside the block, the package is installed in a folder on the path; afterwards LeRobot has forgotten it."""
    from lerobot.configs import PreTrainedConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setattr(processes, "_servers", {})  # those of other tests do not search there
        package = write(site, **changes)
        try:
            yield package
        finally:
            for name in [m for m in sys.modules if m.split(".")[0] == NAME]:
                del sys.modules[name]
            PreTrainedConfig._choice_registry.pop("perceptron", None)
            for server in processes._servers.values():
                server.close()
