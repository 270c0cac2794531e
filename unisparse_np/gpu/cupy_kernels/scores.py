"""Steps 2 and 3 of ALGORITHM.md on the GPU (cuda/scores.cu): compressed attention, summed per block as it is computed."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from ...problem import Problem, ceil_div
from .compress import to_half
from .device import kernel
from .shapes import check_shape, shape_of

THREADS = 256
ROWS = 256  # composite queries a thread block
COLUMNS = 64  # composite keys a stage
WARP_ROWS = 32
UNITS = 2.0**30  # scores are whole numbers of 1 / UNITS of a query block's mass


def score_blocks(qc: Any, kc: Any, problem: Problem) -> tuple[Any, Any]:
    """Steps 2-3. qc [Hc, Tq, d], kc [Hkc, Tk, d] -> mean [Hc, Nq, Nk] float32 and peak, or None when the row threshold is off.

    Blocks that are not visible hold 0.
    """
    check_shape(problem)
    units, peak = score_units(to_half(qc, problem), to_half(kc, problem), problem, clear=True)
    return units.astype(np.float32) / np.float32(UNITS), peak


def score_units(qc: Any, kc: Any, problem: Problem, *, clear: bool = False) -> tuple[Any, Any]:
    """The same from float16 composites, with mean in units: [Hc, Nq, Nk] uint32. Without `clear`, invisible blocks hold anything."""
    config = problem.config
    queries_per_block, keys_per_block = config.block_size // config.q_compress, config.block_size // config.k_compress
    new = cupy.zeros if clear or queries_per_block > WARP_ROWS else cupy.empty
    size = (problem.num_composite_heads, problem.num_q_blocks, problem.num_k_blocks)
    units = new(size, np.uint32)
    peak = None if config.row_threshold is None else new(size, np.float32)
    shared = shared_bytes(problem.head_dim)
    function = kernel(
        "scores.cu", "score_blocks", shared, HEAD_DIM=problem.head_dim, IS_FLOAT16=1,
        QUERIES_PER_BLOCK=queries_per_block, KEYS_PER_BLOCK=keys_per_block,
    )  # fmt: skip
    grid = (ceil_div(problem.num_q_composites, ROWS), problem.num_composite_heads)
    function(grid, (THREADS,), (qc, kc, shape_of(problem), units, np.uint64(0) if peak is None else peak), shared_mem=shared)
    return units, peak


def shared_bytes(head_dim: int) -> int:
    """Shared memory of a thread block: SHARED_BYTES of the source."""
    row = 2 * (head_dim + 8)
    return max(ROWS, 2 * COLUMNS) * row
