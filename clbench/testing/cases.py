"""One row of the table of tests: an algorithm and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """An algorithm on the toy stream.

    Attributes:
        name, config: the `algorithm` section: name (a list for a combination) and keys.
        trains: regular expression for the names of the parameters that change during a task; no others may.
        stores_exemplars: samples are kept after a task.
        adds_parameters: the policy grows.
        visits: checkpoints that a run on the toy stream of three tasks leaves (joint training: 1).
        keeps_old: no later task changes what an earlier one trained.
        overrides: for the rest of the configuration.
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
