"""Steps 2 and 3 of ALGORITHM.md on the GPU: compressed attention, summed per block as it is computed.

cuda/scores_sm90.cu on Hopper for blocks of 16 composites and more, cuda/scores.cu for everything else.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from ...problem import Problem, ceil_div
from . import plain_stages
from .device import capability, tensor_map
from .plan import Plan, plan_of
from .shapes import uses_tensor_cores

PORTABLE_THREADS, PORTABLE_ROWS, PORTABLE_COLUMNS, PORTABLE_WARP_ROWS = 256, 256, 64, 32  # of scores.cu
HOPPER_THREADS, HOPPER_ROWS, HOPPER_COLUMNS, HOPPER_GROUP, HOPPER_STAGES = 640, 256, 128, 16, 4  # of scores_sm90.cu
MERGE_THREADS = 128
HOPPER_HEAD_DIMS = (64, 128)
HOPPER_KEYS_PER_BLOCK = (16, 32, 64)
WORKSPACE_BYTES = 1 << 30  # the most that the sums of 16 keys may take; heads are done in slices that fit
UNITS = 2.0**30  # scores are whole numbers of 1 / UNITS of a query block's mass


def score_blocks(qc: Any, kc: Any, problem: Problem) -> tuple[Any, Any]:
    """Steps 2-3. qc [Hc, Tq, d], kc [Hkc, Tk, d] -> mean [Hc, Nq, Nk] float32 and peak, or None when the row threshold is off.

    float16 composites go to the tensor cores where the shapes fit them; float32 ones are kept in full. Blocks that are not visible
    hold 0.
    """
    plan = plan_of(problem)
    if not uses_tensor_cores(problem, qc.dtype):
        units, peak = plain_stages.score_units(qc, kc, plan)
        return units.astype(np.float32) / np.float32(UNITS), peak
    units, peak = score_units(cupy.ascontiguousarray(qc), cupy.ascontiguousarray(kc), plan, clear=True)
    return units.astype(np.float32) / np.float32(UNITS), peak


def score_units(qc: Any, kc: Any, plan: Plan, *, clear: bool = False) -> tuple[Any, Any]:
    """The same from float16 composites, with mean in units: [Hc, Nq, Nk] uint32. Without `clear`, invisible blocks hold anything."""
    problem, on_hopper = plan.problem, _on_hopper(plan)
    new = cupy.zeros if clear or (plan.queries_per_block > PORTABLE_WARP_ROWS and not on_hopper) else cupy.empty
    size = (problem.num_composite_heads, problem.num_q_blocks, problem.num_k_blocks)
    units = new(size, np.uint32)
    peak = None if problem.config.row_threshold is None else new(size, np.float32)
    (_score_in_one_pass if on_hopper else _score_in_two_passes)(qc, kc, units, np.uint64(0) if peak is None else peak, plan)
    return units, peak


def _on_hopper(plan: Plan) -> bool:
    fits = plan.queries_per_block >= HOPPER_GROUP and plan.keys_per_block in HOPPER_KEYS_PER_BLOCK
    return fits and plan.problem.head_dim in HOPPER_HEAD_DIMS and capability() == (9, 0)


def _score_in_two_passes(qc: Any, kc: Any, units: Any, peak: Any, plan: Plan) -> None:
    problem = plan.problem
    shared = shared_bytes(problem.head_dim)
    function = plan.kernel("scores.cu", "score_blocks", shared)
    grid = (ceil_div(problem.num_q_composites, PORTABLE_ROWS), problem.num_composite_heads)
    function(grid, (PORTABLE_THREADS,), (qc, kc, plan.shape(), units, peak), shared_mem=shared)


def _score_in_one_pass(qc: Any, kc: Any, units: Any, peak: Any, plan: Plan) -> None:
    """Tiles first, then their merger, a slice of heads at a time."""
    problem = plan.problem
    shared, merge_shared = shared_bytes_sm90(problem.head_dim), merge_shared_bytes(plan)
    score = plan.kernel("scores_sm90.cu", "score_tiles", shared)
    merge = plan.kernel("scores_sm90.cu", "merge_scores", merge_shared)
    maps = tensor_map(qc, HOPPER_ROWS), tensor_map(kc, HOPPER_COLUMNS)
    tiles = ceil_div(problem.num_k_composites, HOPPER_COLUMNS)
    rows = ceil_div(problem.num_q_composites, 16) * 16
    heads_at_once = min(problem.num_composite_heads, max(1, WORKSPACE_BYTES // (rows * tiles * (2 * HOPPER_COLUMNS // HOPPER_GROUP + 4))))
    sums = cupy.empty((heads_at_once, rows, tiles, HOPPER_COLUMNS // HOPPER_GROUP), np.float16)
    maxima = cupy.empty((heads_at_once, rows, tiles), np.float32)
    shape = plan.shape()
    for first in range(0, problem.num_composite_heads, heads_at_once):
        heads = min(heads_at_once, problem.num_composite_heads - first)
        grid = (ceil_div(problem.num_q_composites, HOPPER_ROWS), heads)
        score(grid, (HOPPER_THREADS,), (*maps, shape, np.int32(first), sums, maxima), shared_mem=shared)
        arguments = (sums, maxima, shape, np.int32(first), units, peak)
        merge((problem.num_q_blocks, heads), (MERGE_THREADS,), arguments, shared_mem=merge_shared)


def shared_bytes(head_dim: int) -> int:
    """Shared memory of a thread block: SHARED_BYTES of scores.cu."""
    return max(PORTABLE_ROWS, 2 * PORTABLE_COLUMNS) * 2 * (head_dim + 8)


def shared_bytes_sm90(head_dim: int) -> int:
    """Shared memory of a thread block of score_tiles: SHARED_BYTES of scores_sm90.cu."""
    return (HOPPER_ROWS + HOPPER_STAGES * HOPPER_COLUMNS) * head_dim * 2 + 128 + 1024


def merge_shared_bytes(plan: Plan) -> int:
    """Shared memory of a thread block of merge_scores: mean and peak of every key block, and the sums of 16 queries."""
    blocks = ceil_div(plan.problem.num_k_composites, HOPPER_COLUMNS) * (HOPPER_COLUMNS // plan.keys_per_block)
    return 4 * (2 * blocks + 16 + 2 * 4 * 16)
