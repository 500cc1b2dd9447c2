"""Evaluation: which cells, which episodes, their records, the matrix. The parent process imports no torch."""
