"""Step 1 of ALGORITHM.md on the GPU (cuda/compress.cu), and the anchors of step 6, found in the same pass over the keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import cupy
import numpy as np

from ...config import UniSparseConfig
from ...problem import KeySummary, Problem, ceil_div
from . import plain_stages
from .plan import Plan, plan_of
from .program import Launch, launch_all
from .room import bytes_of
from .shapes import NO_ROWS, Rows, check_dtype, is_float16, rows_of, uses_tensor_cores

THREADS = 128
CONVERT_THREADS = 256


class Pooled(NamedTuple):
    """What one pass over q and k gives: composites [heads, tokens, d] and anchors [Hkv, Nk, r] int32; None where not asked for."""

    qc: Any
    kc: Any
    anchors: Any


def compress(q: Any, k: Any, problem: Problem, key_summary: KeySummary | None = None) -> tuple[Any, Any]:
    """Step 1. q [Hq, Lq, d], k [Hkv, Lk, d] -> qc [Hc, Tq, d], kc [Hkc, Tk, d] float32.

    With key_summary (a cache's composite keys) no key is read.
    """
    check_dtype(q.dtype)
    pooled = pool(q, k, plan_of(problem), np.float32, with_keys=key_summary is None, with_anchors=False)
    return pooled.qc, pooled.kc if key_summary is None else key_summary.kc


def find_anchors(k: Any, block_size: int, key_anchors: int) -> Any:
    """Step 6. Positions of each block's keys of smallest norm: k [Hkv, Lk, d] -> [Hkv, Nk, r] int32.

    In ascending norm, the lower position first on ties; -1 where a ragged last block has fewer keys than r.
    """
    heads, length, dim = k.shape
    config = UniSparseConfig(block_size=block_size, q_compress=1, k_compress=block_size, key_anchors=key_anchors)
    problem = Problem(heads, heads, 1, length, dim, config)
    check_dtype(k.dtype)
    if key_anchors == 0:
        return cupy.zeros((heads, problem.num_k_blocks, 0), np.int32)
    return pool(None, k, plan_of(problem), np.float32, with_keys=True, with_anchors=True).anchors


def pool(q: Any, k: Any, plan: Plan, dtype: Any, *, with_keys: bool, with_anchors: bool) -> Pooled:
    """One launch over q (or None) and, with_keys, over k. dtype float32, or float16 for the tensor cores (saturating at 65504)."""
    if not uses_tensor_cores(plan.problem, k.dtype):
        return Pooled(*plain_stages.pool(q, k, plan.problem, with_keys=with_keys, with_anchors=with_anchors))
    qc = cupy.empty(plan.qc_shape, dtype) if q is not None else None
    kc = cupy.empty(plan.kc_shape, dtype) if with_keys else None
    anchors = cupy.empty(plan.anchors_shape, np.int32) if with_anchors and plan.problem.config.key_anchors else None
    queries, keys = NO_ROWS if q is None else rows_of(q), rows_of(k) if with_keys else NO_ROWS
    qc_at, kc_at, anchors_at = (0 if x is None else x.data.ptr for x in (qc, kc, anchors))
    launch_all(pooling(queries, keys, qc_at, kc_at, anchors_at, plan, is_float16(k.dtype), to_float16=dtype == np.float16))
    return Pooled(qc, kc, anchors)


def pooling(q: Rows, k: Rows, qc: int, kc: int, anchors: int, plan: Plan, of_float16: bool, *, to_float16: bool = True) -> Iterator[Launch]:
    """Composites of q and of k, each unless NO_ROWS, to the addresses qc and kc; anchors of k unless that address is 0."""
    problem = plan.problem
    q_parts = problem.num_composite_heads * problem.num_q_blocks
    k_parts = problem.num_composite_kv_heads * problem.num_k_blocks
    grid = (q_parts if q.address else 0) + (k_parts if k.address else 0)
    if grid == 0:
        return
    shared = 4 * problem.config.block_size * problem.kv_heads_per_composite
    launcher = plan.launcher("compress.cu", "compress", THREADS, shared, of_float16)
    strides = (q.head_stride, q.row_stride, k.head_stride, k.row_stride)
    outputs = (qc, 0, kc, 0) if to_float16 else (0, qc, 0, kc)
    arguments = (q.address, k.address, *strides, plan.packed_shape(), *outputs, anchors, 0 if q.address else q_parts)
    yield Launch(launcher, grid, 1, arguments)


def composite_sizes(plan: Plan) -> dict[str, int]:
    """Bytes of the composites qc and kc in float16."""
    return {"qc": bytes_of(plan.qc_shape, np.float16), "kc": bytes_of(plan.kc_shape, np.float16)}


def coarse_sizes(plan: Plan) -> dict[str, int]:
    """Bytes of Top-P's own composites in float16, and 0 where both rules read the same."""
    if plan.problem.config.top_p_compress is None:
        return {"coarse_qc": 0, "coarse_kc": 0}
    coarse = plan.rules[0]
    return {"coarse_qc": bytes_of(coarse.qc_shape, np.float16), "coarse_kc": bytes_of(coarse.kc_shape, np.float16)}


def coarsening(qc: int, kc: Rows, coarse_qc: int, coarse_kc: int, plan: Plan) -> Launch:
    """Step 1 for a Top-P with composites of its own, from those of q (contiguous, at the address qc) and k; all in float16."""
    coarse = plan.rules[0]
    launcher = plan.launcher("compress.cu", "coarsen", CONVERT_THREADS)
    heads = coarse.qc_shape[0] + coarse.kc_shape[0]
    columns = ceil_div(max(coarse.qc_shape[1], coarse.kc_shape[1]) * plan.problem.head_dim // 8, CONVERT_THREADS)
    width = plan.problem.config.top_p_compress
    return Launch(launcher, columns, heads, (qc, kc.address, kc.head_stride, plan.packed_shape(), width, coarse_qc, coarse_kc))


def to_half(composites: Any, plan: Plan) -> Any:
    """float32 composites as float16 (saturating at 65504), for the tensor cores; float16 ones as they are."""
    if composites.dtype == np.float16:
        return composites
    composites = cupy.ascontiguousarray(composites, dtype=np.float32)
    half = cupy.empty(composites.shape, np.float16)
    pairs = composites.size // 2
    launch = plan.launcher("compress.cu", "to_half", CONVERT_THREADS)
    launch(ceil_div(pairs, CONVERT_THREADS), 1, composites.data.ptr, half.data.ptr, pairs)
    return half


def as_composites(x: Any, problem: Problem, dtype: Any) -> Any:
    """Composite tokens [heads, tokens, d] as step 2 takes them for inputs of this dtype: float16 for the tensor cores, or float32."""
    return to_half(x, plan_of(problem)) if uses_tensor_cores(problem, dtype) else cupy.ascontiguousarray(x, dtype=np.float32)
