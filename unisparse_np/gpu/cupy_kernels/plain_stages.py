"""The stages for what the tensor cores do not take: float32, other head dims and block sizes, any scale (cuda/plain_*.cu).

shapes.uses_tensor_cores decides; compress.py, scores.py and attend.py hand over to the functions here. Inputs are float32 or 16
bits, arithmetic and composites are float32.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from ...problem import Problem, ceil_div
from .device import kernel
from .plan import Plan
from .shapes import element_strides

SIDE, THREADS = 16, 256  # of plain.cuh: SIDE x SIDE threads
POOL_WARPS = 4  # of plain_compress.cu
NULL = np.uint64(0)


def pool(q: Any, k: Any, problem: Problem, *, with_keys: bool, with_anchors: bool) -> tuple[Any, Any, Any]:
    """Step 1 and the anchors. q [Hq, Lq, d] or None, k [Hkv, Lk, d] -> qc [Hc, Tq, d], kc [Hkc, Tk, d] float32, anchors [Hkv, Nk, r]."""
    config = problem.config
    qc = kc = anchors = None
    if q is not None:
        qc = _pool(with_whole_rows(q), config.q_compress, config.head_compress)
    k = with_whole_rows(k)
    if with_keys:
        kc = _pool(k, config.k_compress, problem.kv_heads_per_composite)
    if with_anchors and config.key_anchors:
        anchors = _find_anchors(k, config.block_size, config.key_anchors)
    return qc, kc, anchors


def score_units(qc: Any, kc: Any, plan: Plan) -> tuple[Any, Any]:
    """Steps 2-3. qc [Hc, Tq, d], kc [Hkc, Tk, d] -> mean in units [Hc, Nq, Nk] uint32 and peak float32, or None without the row rule."""
    problem, config = plan.problem, plan.problem.config
    qc, kc = (cupy.ascontiguousarray(x, dtype=np.float32) for x in (qc, kc))
    if config.top_p_compress is not None:
        of_top_p, of_row_threshold = plan.rules
        coarse_qc = _coarsen(qc, problem.q_len, config.q_compress, config.top_p_compress)
        coarse_kc = _coarsen(kc, problem.k_len, config.k_compress, config.top_p_compress)
        return score_units(coarse_qc, coarse_kc, of_top_p)[0], score_units(qc, kc, of_row_threshold)[1]
    units = cupy.empty((problem.num_composite_heads, problem.num_q_blocks, problem.num_k_blocks), np.uint32)
    peak = None if problem.config.row_threshold is None else cupy.empty(units.shape, np.float32)
    rows = _tile_rows(plan.queries_per_block, most=2 * SIDE)
    shared = score_shared_bytes(problem.head_dim, rows, plan.queries_per_block)
    function = kernel("plain_scores.cu", "score_plain", shared, HEAD_DIM=problem.head_dim, TILE_ROWS=rows)
    arguments = (qc, kc, plan.shape(), units, NULL if peak is None else peak)
    function((problem.num_q_blocks, problem.num_composite_heads), (THREADS,), arguments, shared_mem=shared)
    return units, peak


def attend(q: Any, k: Any, v: Any, words: Any, heads_per_mask: int, anchors: Any, plan: Plan) -> tuple[Any, Any, str]:
    """Step 6. q [Hq, Lq, d], k, v [Hkv, Lk, d] -> out [Hq, Lq, d] in their dtype, lse [Hq, Lq] float32, the kernel's name.

    words [rows, Nq, words per row] uint32: the block mask, a row serving heads_per_mask query heads; None for dense attention.
    anchors [Hkv, Nk, r] int32 or None.
    """
    problem = plan.problem
    q, k, v = with_whole_rows(q), with_whole_rows(k), with_whole_rows(v)
    out = cupy.empty((problem.q_len, problem.num_q_heads, problem.head_dim), q.dtype).transpose(1, 0, 2)  # a model reads it by token
    lse = cupy.empty(out.shape[:2], np.float32)
    block_size = problem.config.block_size
    rows = _tile_rows(min(block_size, problem.q_len), most=4 * SIDE if problem.head_dim <= 128 else 2 * SIDE)
    shared = attend_shared_bytes(problem.head_dim, rows)
    function = kernel("plain_attend.cu", "attend_plain", shared, HEAD_DIM=problem.head_dim, TILE_ROWS=rows, **_type_of(q))
    with_anchors = anchors is not None and words is not None
    arguments = (
        q, k, v, out, *element_strides(q), *element_strides(k), *element_strides(v), *element_strides(out),
        plan.shape(heads_per_mask, with_anchors), NULL if words is None else words,
        cupy.ascontiguousarray(anchors, dtype=np.int32) if with_anchors else NULL, lse,
    )  # fmt: skip
    grid = problem.num_q_blocks * ceil_div(block_size, rows), problem.num_q_heads
    function(grid, (THREADS,), arguments, shared_mem=shared)
    return out, lse, f"attend_plain d{problem.head_dim} S{block_size} {q.dtype}"


def with_whole_rows(x: Any) -> Any:
    """x [H, L, d] itself when its rows are contiguous and can be read four elements at a time, otherwise a copy."""
    alignment = (4 if x.shape[2] % 4 == 0 else 1) * x.itemsize
    whole = x.strides[2] == x.itemsize and min(x.strides) > 0 and all(n % alignment == 0 for n in (*x.strides[:2], x.data.ptr))
    return x if whole else x.copy(order="C")


def score_shared_bytes(head_dim: int, tile_rows: int, queries_per_block: int) -> int:
    """Shared memory of a thread block of plain_scores.cu (its map)."""
    keys = _tile_keys(head_dim)
    return 16 * _stride(head_dim) * (tile_rows + keys) + 4 * tile_rows * (2 * keys + SIDE) + 8 * queries_per_block


def attend_shared_bytes(head_dim: int, tile_rows: int) -> int:
    """Shared memory of a thread block: SHARED_BYTES of plain_attend.cu."""
    keys = _tile_keys(head_dim)
    return 16 * _stride(head_dim) * (tile_rows + keys) + 4 * tile_rows * (keys + SIDE) + 4 * keys


def _pool(x: Any, width: int, members: int) -> Any:
    heads, length, dim = x.shape
    composites = ceil_div(length, width)
    pooled = cupy.empty((heads // members, composites, dim), np.float32)
    function = kernel("plain_compress.cu", "pool_plain", 0, HEAD_DIM=dim, **_type_of(x))
    numbers = (np.int32(n) for n in (length, width, members, composites))
    grid = ceil_div(composites, POOL_WARPS), heads // members
    function(grid, (32 * POOL_WARPS,), (x, *element_strides(x), *numbers, pooled))
    return pooled


def _coarsen(x: Any, length: int, held: int, width: int) -> Any:
    """Means of `held` of the length tokens, x [H, ceil(length / held), d] -> means of `width` tokens [H, ceil(length / width), d]."""
    heads, composites, dim = x.shape
    coarse = cupy.empty((heads, ceil_div(length, width), dim), np.float32)
    function = kernel("plain_compress.cu", "coarsen_plain", 0, HEAD_DIM=dim, **_type_of(x))
    numbers = (np.int32(n) for n in (length, held, width, composites, coarse.shape[1]))
    function((ceil_div(coarse.shape[1], POOL_WARPS), heads), (32 * POOL_WARPS,), (x, *numbers, coarse))
    return coarse


def _find_anchors(k: Any, block_size: int, key_anchors: int) -> Any:
    heads, length, dim = k.shape
    anchors = cupy.empty((heads, ceil_div(length, block_size), key_anchors), np.int32)
    shared = 4 * block_size
    function = kernel("plain_compress.cu", "find_anchors_plain", shared, HEAD_DIM=dim, **_type_of(k))
    arguments = (k, *element_strides(k), *(np.int32(n) for n in (length, block_size, key_anchors)), anchors)
    function((anchors.shape[1], heads), (32 * POOL_WARPS,), arguments, shared_mem=shared)
    return anchors


def _type_of(x: Any) -> dict[str, int]:
    return {"IS_FLOAT32": int(x.dtype == np.float32), "IS_FLOAT16": int(x.dtype == np.float16)}


def _tile_rows(rows: int, most: int) -> int:
    """The smallest tile of 16, 32 or 64 rows that holds so many, or the largest that is allowed."""
    return min(most, SIDE if rows <= SIDE else 2 * SIDE if rows <= 2 * SIDE else 4 * SIDE)


def _tile_keys(head_dim: int) -> int:
    """KEYS of plain_scores.cu and plain_attend.cu."""
    return 32 if head_dim > 128 else 64


def _stride(head_dim: int) -> int:
    """STRIDE of plain.cuh."""
    return ceil_div(head_dim, 4) | 1
