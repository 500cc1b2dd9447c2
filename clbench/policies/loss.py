"""Names that plugins for earlier versions import: see view.py."""

from clbench.policies.view import PolicyView as PolicyLoss
from clbench.policies.view import without_dropout

__all__ = ["PolicyLoss", "without_dropout"]
