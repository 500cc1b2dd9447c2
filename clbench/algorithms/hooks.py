"""The names that an algorithm's file imports; `protocol.py` opens with the loop that calls its hooks."""

from clbench.algorithms.checks import CLAIMS, check_hooks, stands_alone
from clbench.algorithms.context import Collective, Context, iterate_named
from clbench.algorithms.protocol import CLAlgorithm, GradientView, Phase, Plan, WeightView, training_phase

__all__ = [
    "CLAIMS", "CLAlgorithm", "Collective", "Context", "GradientView", "Phase", "Plan", "WeightView", "check_hooks",
    "iterate_named", "stands_alone", "training_phase",
]  # fmt: skip
