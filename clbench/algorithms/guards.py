"""Claims are enforced where they apply: an algorithm without the claim cannot write gradients or weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from clbench.errors import UserError

if TYPE_CHECKING:
    from clbench.algorithms.protocol import CLAlgorithm


def guard(view: Any, algorithm: CLAlgorithm, claim: str) -> Any:
    """`view` itself for an algorithm that claims `claim`, else a read-only one."""
    return view if claim in algorithm.claims else _ReadOnly(view, algorithm.name, claim)


class _ReadOnly:
    """A GradientView or WeightView of copies."""

    def __init__(self, view: Any, name: str, claim: str) -> None:
        self._view, self._name, self._claim = view, name, claim

    def names(self) -> Sequence[str]:
        names: Sequence[str] = self._view.names()
        return names

    def get(self, name: str) -> Tensor | None:
        value: Tensor | None = self._view.get(name)
        return None if value is None else value.detach().clone()

    def set(self, name: str, value: Tensor) -> None:
        self._refuse()

    def set_where(self, name: str, mask: Tensor, value: Tensor) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        what = "gradients" if self._claim == "gradient_edits" else "weights"
        raise UserError(
            f"{self._name} writes {what} and so must claim '{self._claim}': "
            f'claims = frozenset({{"{self._claim}"}}) in its class.'
        )
