"""One row per algorithm. Every registered algorithm must have one; tests/test_algorithms.py runs each through all.

`trains`: a regular expression of the parameters that must move during a task; none outside it may.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """An algorithm on the toy stream."""

    name: str | list[str]
    config: dict[str, Any] = field(default_factory=dict)
    trains: str = ".*"
    stores_exemplars: bool = False
    adds_parameters: bool = False
    visits: int = 3

    @property
    def section(self) -> dict[str, Any]:
        return {"name": self.name, **self.config}

    @property
    def label(self) -> str:
        return self.name if isinstance(self.name, str) else "+".join(self.name)


SMALL_CLARE = {
    "adapter_hidden": 8,
    "discriminator_hidden": 8,
    "discriminator_latent": 4,
    "discriminator_steps": 6,
    "detect_steps": 3,
    "adapter_lr": 3e-3,
}

CASES = [
    Case("seqfft"),
    Case("er", {"buffer_size_per_task": 10}, stores_exemplars=True),
    Case("clare", SMALL_CLARE, trains=r".*\.clare_(adapters|discriminators)\..*", adds_parameters=True),
    Case("multitask", visits=1),
    Case("singletask"),
    Case(["er", "clare"], {"buffer_size_per_task": 10, **SMALL_CLARE}, stores_exemplars=True, adds_parameters=True,
         trains=r".*\.clare_(adapters|discriminators)\..*"),
]  # fmt: skip
