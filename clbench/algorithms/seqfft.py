"""SeqFFT: sequential full fine-tuning, the lower bound.

Every hook is left alone: each task's data trains all weights. LIBERO (arXiv 2306.03310) calls it SeqL.
"""

from __future__ import annotations

from clbench.algorithms.hooks import CLAlgorithm


class SeqFFT(CLAlgorithm):
    """Fine-tune all weights on one task after the other."""

    name = "seqfft"
