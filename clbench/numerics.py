"""The version of the numerics: it grows with every change that makes the same command train different weights.

Runs of two versions are not averaged as seeds, and reports note when a table holds both. `tests/test_numerics.py`
trains two tiny runs and compares them with recorded weights, so that no change goes unnoticed. Rounding does not count.
"""

NUMERICS = 1
# Policy types whose own losses changed, and how often: those of LeRobot that draw from outside (policies/draws.py).
RAISED = {"act": 1, "diffusion": 1, "multi_task_dit": 1, "pi0": 1, "pi05": 1, "smolvla": 1}


def numerics(policy_type: str | None) -> int:
    """The version for a policy type."""
    return NUMERICS + RAISED.get(policy_type or "", 0)
