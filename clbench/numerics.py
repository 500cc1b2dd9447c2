"""The version of the numbers: it grows with every change that lets the same command train other weights.

Runs of two versions are not seeds of one another, and reports say where a table holds both. `tests/test_numerics.py`
trains two tiny runs and compares them with recorded weights, so that no change goes unnoticed. Rounding does not count.
"""

NUMERICS = 1
