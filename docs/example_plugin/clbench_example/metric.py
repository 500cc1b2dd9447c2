"""A metric of the last row."""

from clbench.metrics import metric


@metric(("final",), "min over tasks j of R[N-1][j]", "clbench's example plugin", higher_is_better=True, of="final row")
def worst_task(final):
    """min_j R[N−1, j]: the last checkpoint's success on its worst task."""
    return final.min(axis=-1)
