"""An algorithm as the table tests train it: one row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """An algorithm on the toy stream.

    Attributes:
        trains: which parameters move during a task: all that match, and none else.
        keeps_old: what one task trained, no later task changes.
        overrides: of the rest of the configuration.
        label: the test's name; "" = the algorithm's.
    """

    name: str | list[str]
    config: dict[str, Any] = field(default_factory=dict)
    trains: str = ".*"
    stores_exemplars: bool = False
    adds_parameters: bool = False
    visits: int = 3
    keeps_old: bool = False
    overrides: tuple[str, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name if isinstance(self.name, str) else "+".join(self.name))

    @property
    def section(self) -> dict[str, Any]:
        return {"name": self.name, **self.config}
