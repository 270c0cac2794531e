"""Step 1 of ALGORITHM.md on the GPU (cuda/compress.cu), and the anchors of step 6, found in the same pass over the keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np

from ...config import UniSparseConfig
from ...problem import KeySummary, Problem, ceil_div
from . import plain_stages
from .plan import Plan, plan_of
from .shapes import aligned, anchor_pitch, check_dtype, element_strides, uses_tensor_cores

THREADS = 128


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
    problem, config = plan.problem, plan.problem.config
    k = aligned(k)
    q = k if q is None else aligned(q)
    queries_wanted = q is not k
    qc = cupy.empty((problem.num_composite_heads, problem.num_q_composites, problem.head_dim), dtype) if queries_wanted else None
    kc = cupy.empty((problem.num_composite_kv_heads, problem.num_k_composites, problem.head_dim), dtype) if with_keys else None
    anchors = None
    if with_anchors and config.key_anchors:
        anchors = cupy.empty((problem.num_kv_heads, problem.num_k_blocks, config.key_anchors), np.int32)
    q_parts = problem.num_composite_heads * problem.num_q_blocks
    k_parts = problem.num_composite_kv_heads * problem.num_k_blocks
    shared = 4 * config.block_size * problem.kv_heads_per_composite
    function = plan.kernel("compress.cu", "compress", shared, k.dtype)
    half, nothing = dtype == np.float16, np.uint64(0)
    outputs = (qc, nothing, kc, nothing) if half else (nothing, qc, nothing, kc)
    arguments = (
        q,
        k,
        *element_strides(q),
        *element_strides(k),
        plan.shape(),
        *outputs,
        anchors,
        np.int32(0 if queries_wanted else q_parts),
    )
    grid = (q_parts if queries_wanted else 0) + (k_parts if with_keys else 0)
    if grid == 0:
        return Pooled(None, None, None)
    function((grid,), (THREADS,), tuple(nothing if x is None else x for x in arguments), shared_mem=shared)
    return Pooled(qc, kc, anchors)


def to_half(composites: Any, plan: Plan) -> Any:
    """float32 composites as float16 (saturating at 65504), for the tensor cores."""
    composites = cupy.ascontiguousarray(composites, dtype=np.float32)
    half = cupy.empty(composites.shape, np.float16)
    pairs = composites.size // 2
    function = plan.kernel("compress.cu", "to_half", 0)
    function((ceil_div(pairs, 256),), (256,), (composites, half, np.int64(pairs)))
    return half


def as_composites(x: Any, problem: Problem, dtype: Any) -> Any:
    """Composite tokens [heads, tokens, d] as step 2 takes them for inputs of this dtype: float16 for the tensor cores, or float32."""
    return to_half(x, plan_of(problem)) if uses_tensor_cores(problem, dtype) else cupy.ascontiguousarray(x, dtype=np.float32)


def gather_anchors(k: Any, v: Any, anchors: Any, plan: Plan) -> tuple[Any, Any]:
    """Anchor keys and values side by side: k, v [Hkv, Lk, d], anchors [Hkv, Nk, r] -> two [Hkv, r * pitch, d], zero where there is none."""
    problem = plan.problem
    rows = problem.config.key_anchors * anchor_pitch(problem)
    keys = cupy.empty((problem.num_kv_heads, rows, problem.head_dim), k.dtype)
    values = cupy.empty_like(keys)
    function = plan.kernel("compress.cu", "gather_anchors", 0, k.dtype)
    chunks = rows * problem.head_dim // 8
    anchors = cupy.ascontiguousarray(anchors)
    arguments = (k, v, *element_strides(k), *element_strides(v), plan.shape(), anchors, keys, values)
    function((ceil_div(chunks, 256), problem.num_kv_heads), (256,), arguments)
    return keys, values
