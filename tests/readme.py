"""The README's algorithm, as it stands there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def example() -> types.ModuleType:
    """The module that README's block of code is."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(# clbench/algorithms/.*?)```", readme, flags=re.DOTALL)
    module = types.ModuleType("readme_example")
    sys.modules["readme_example"] = module  # where its dataclass looks for its annotations
    exec(compile(source, "README.md", "exec"), module.__dict__)
    return module
