"""The version of the numerics: it grows with every change that makes the same command train different weights.

Runs of two versions are not averaged as seeds, and reports note when a table holds both. `tests/test_numerics.py`
trains two tiny runs and compares them with recorded weights, so that no change goes unnoticed. Rounding does not count.
"""

NUMERICS = 1
