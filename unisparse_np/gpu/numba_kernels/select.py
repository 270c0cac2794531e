"""Steps 4 and 5 of ALGORITHM.md on a GPU: keep the blocks that hold the mass, and those that are always kept.

The same step: reference/select.py in NumPy, cupy_kernels/select.py in CUDA C++.

Top-P without sorting. A block is kept when the blocks ahead of it, those that *beat* it, hold less than P:

    before[j] = sum of B[m] over blocks m with B[m] > B[j], or B[m] = B[j] and m < j
    keep j    if before[j] < P

That is the shortest prefix, highest first, whose sum reaches P: in that order `before` is the running sum ahead of each
block. Every block finds its own place by looking at all others: Nk^2 comparisons a row instead of Nk log Nk, but no thread
waits for another, nothing is moved, and 1,024 blocks (131,072 tokens) take about a million comparisons a row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from ...problem import Problem
from .device import computing, empty, hand_back
from .shapes import per_head, shapes_of
from .tile import IN_SIMULATOR

THREADS = 4 if IN_SIMULATOR else 128


def select_blocks(mean: Any, peak: Any, problem: Problem) -> Any:
    """Steps 4-5. mean, peak [Hc, Nq, Nk] -> mask [Hq, Nq, Nk] bool, composite heads repeated.

    peak is read only when the row threshold is on.
    """
    config, shapes = problem.config, shapes_of(problem)
    scores = computing(mean)
    peaks = scores if config.row_threshold is None else computing(peak)
    mask = empty((problem.num_q_heads, problem.num_q_blocks, problem.num_k_blocks), np.bool_)
    select[(problem.num_q_blocks, problem.num_composite_heads), THREADS](
        scores.data,
        peaks.data,
        per_head(config.top_p, problem, off=0.0, dtype=np.float64),  # no running sum is below 0: keeps nothing
        per_head(config.row_threshold, problem, off=math.inf, dtype=scores.dtype),  # no peak is above infinity
        shapes.visible_blocks,
        shapes.sink_stop,
        shapes.local_start,
        shapes.local_stop,
        config.head_compress,
        mask.data,
    )
    return hand_back(mask, mean)


@cuda.jit
def select(mean, peak, top_p, row_threshold, visible_blocks, sink_stop, local_start, local_stop, head_compress, mask):
    """CUDA block (i, h): query block i of composite head h. Thread: every (number of threads)-th key block j."""
    i, h = cuda.blockIdx.x, cuda.blockIdx.y
    visible = visible_blocks[i]
    for j in range(cuda.threadIdx.x, mean.shape[2], cuda.blockDim.x):
        keep = False
        if j < visible:
            score = mean[h, i, j]
            before = 0.0  # float64, as the running sum of the reference
            for m in range(visible):
                if mean[h, i, m] > score or (mean[h, i, m] == score and m < j):
                    before += mean[h, i, m]
            keep = before < top_p[h] or top_p[h] == 1.0  # step 4, Top-P; P = 1 keeps all, whatever the sum rounds to
            keep = keep or peak[h, i, j] > row_threshold[h]  # step 4, row threshold
            keep = keep or j < sink_stop[i] or local_start[i] <= j < local_stop[i]  # step 5
        for head in range(h * head_compress, (h + 1) * head_compress):
            mask[head, i, j] = keep
