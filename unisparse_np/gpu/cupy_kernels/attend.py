"""Step 6 of ALGORITHM.md on the GPU: attend_sm90.cu on Hopper, attend_sm80.cu elsewhere; dense attention is the same kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np

from ...problem import KeySummary, Problem, ceil_div
from .compress import find_anchors, gather_anchors
from .device import capability, num_multiprocessors, tensor_map
from .plan import Plan, plan_of
from .select import BlockMask, from_bool
from .shapes import aligned, check_dtype, element_strides

L2_SECTION_BYTES = 32 << 20  # keys and values worked on at a time: they stay in the L2 of an A100, H100 or H200
HOPPER_HEAD_DIMS = (64, 128)
REPAIR_BLOCKS, REPAIR_THREADS = 64, 128


class Attended(NamedTuple):
    """out [Hq, Lq, d] in the dtype of q, lse [Hq, Lq] float32 (natural log), and the name of the kernel that ran."""

    out: Any
    lse: Any
    kernel: str


def sparse_attention(q: Any, k: Any, v: Any, mask: Any, problem: Problem, key_summary: KeySummary | None = None) -> tuple[Any, Any]:
    """Step 6. q [Hq, Lq, d], k, v [Hkv, Lk, d], mask [Hq, Nq, Nk] bool -> out [Hq, Lq, d] in the dtype of q, lse [Hq, Lq] float32.

    A query with nothing to attend has out 0 and lse -inf. With key_summary its anchors are taken as they are.
    """
    check_dtype(q.dtype)
    anchors = None
    if problem.config.key_anchors:
        anchors = find_anchors(k, problem.config.block_size, problem.config.key_anchors) if key_summary is None else key_summary.anchors
    result = attend(q, k, v, from_bool(mask), anchors, plan_of(problem))
    return result.out, result.lse


def dense_attention(q: Any, k: Any, v: Any, problem: Problem) -> tuple[Any, Any]:
    """The same attention with every visible key: q [Hq, Lq, d], k, v [Hkv, Lk, d] -> out [Hq, Lq, d], lse [Hq, Lq]."""
    check_dtype(q.dtype)
    result = attend(q, k, v, None, None, plan_of(problem))
    return result.out, result.lse


def attend(q: Any, k: Any, v: Any, mask: BlockMask | None, anchors: Any, plan: Plan) -> Attended:
    """Step 6 with the mask as words (None: dense) and the anchors as positions [Hkv, Nk, r] (None: no anchors)."""
    problem = plan.problem
    q, k, v = aligned(q), aligned(k), aligned(v)
    on_hopper = capability() == (9, 0) and problem.head_dim in HOPPER_HEAD_DIMS
    with_anchors = anchors is not None and mask is not None
    shape = plan.shape(1 if mask is None else mask.heads_per_row, with_anchors)
    anchors = cupy.ascontiguousarray(anchors) if with_anchors else np.uint64(0)
    anchor_keys, anchor_values = gather_anchors(k, v, anchors, plan) if with_anchors else (k, v)

    tile_rows = 64 if problem.config.block_size == 64 else 128
    num_items = problem.num_q_heads * ceil_div(problem.q_len, tile_rows)
    state = cupy.empty(4 + 2 * num_items * (tile_rows // 16), np.int32)  # item counter, -, then what repair.cu has to look at
    counter, broken = state[:2], state[2:]
    work = _schedule(mask, shape, plan, tile_rows, num_items, counter, broken)
    out = cupy.empty((problem.num_q_heads, problem.q_len, problem.head_dim), q.dtype)
    lse = cupy.empty(out.shape[:2], np.float32)
    words = np.uint64(0) if mask is None else mask.words

    if on_hopper:
        consumers = tile_rows // 64
        shared = shared_bytes_sm90(problem.head_dim, problem.config.block_size)
        function = plan.kernel("attend_sm90.cu", "attend_sm90", shared, q.dtype)
        tiles = [tensor_map(x, tile_rows) for x in (q, k, v)]
        maps = (*tiles, tensor_map(out, 64), tensor_map(anchor_keys, tile_rows), tensor_map(anchor_values, tile_rows))
        grid = min(num_items, num_multiprocessors() * (1 if consumers == 2 else 3 if problem.head_dim == 64 else 2))
        arguments = (*maps, shape, work, np.int32(num_items), words, anchors, lse, counter, broken)
        function((grid,), (128 * (consumers + 1),), arguments, shared_mem=shared)
    else:
        shared = shared_bytes_sm80(problem.head_dim, problem.config.block_size)
        function = plan.kernel("attend_sm80.cu", "attend_sm80", shared, q.dtype)
        strides = (*element_strides(q), *element_strides(k), *element_strides(v))
        arguments = (q, k, v, out, anchor_keys, anchor_values, *strides, shape, work, words, anchors, lse, broken)
        function((num_items,), (threads_sm80(problem.head_dim, tile_rows),), arguments, shared_mem=shared)
    _repair(q, k, v, out, shape, words, anchors, broken, plan)
    name = f"attend_{'sm90' if on_hopper else 'sm80'} d{problem.head_dim} S{problem.config.block_size}"
    return Attended(out, lse, f"{name} {'float16' if q.dtype == np.float16 else 'bfloat16'}")


def shared_bytes_sm90(head_dim: int, block_size: int) -> int:
    """Shared memory of a thread block: SHARED_BYTES of attend_sm90.cu."""
    consumers = 1 if block_size == 64 else 2
    tile = 64 * consumers * head_dim * 2
    q_stages, kv_stages = (2 if consumers == 2 else 1), (3 if head_dim == 64 else 2)
    return (q_stages + 2 * kv_stages + 1) * tile + 128 + 16 * q_stages + 16 + 1024


def shared_bytes_sm80(head_dim: int, block_size: int) -> int:
    """Shared memory of a thread block: SHARED_BYTES of attend_sm80.cu."""
    q_rows, k_rows = (64 if block_size == 64 else 128), (32 if head_dim > 128 else 64)
    return 256 + (q_rows + 4 * k_rows) * (head_dim + 8) * 2


def threads_sm80(head_dim: int, tile_rows: int) -> int:
    """THREADS of attend_sm80.cu."""
    return 256 if head_dim > 128 and tile_rows == 128 else 128


def _schedule(mask: BlockMask | None, shape: np.ndarray, plan: Plan, tile_rows: int, num_items: int, counter: Any, broken: Any) -> Any:
    """The items of the attention kernel, longest first within sections; also clears the kernel's counters."""
    problem = plan.problem
    work = cupy.empty((num_items, 2), np.int32)
    bytes_per_head = 4 * problem.k_len * problem.head_dim
    kv_heads = 1 << max(0, (L2_SECTION_BYTES // bytes_per_head).bit_length() - 1)
    heads = min(kv_heads, problem.num_kv_heads) * problem.group_size
    counts = np.uint64(0) if mask is None else mask.counts
    function = plan.kernel("schedule.cu", "schedule", 4096)
    arguments = (shape, counts, work, np.int32(tile_rows), np.int32(heads), counter, broken)
    function((ceil_div(problem.num_q_heads, heads),), (1024,), arguments, shared_mem=4096)
    return work


def _repair(q: Any, k: Any, v: Any, out: Any, shape: np.ndarray, words: Any, anchors: Any, broken: Any, plan: Plan) -> None:
    function = plan.kernel("repair.cu", "repair", 0, q.dtype)
    strides = (*element_strides(q), *element_strides(k), *element_strides(v))
    function((REPAIR_BLOCKS,), (REPAIR_THREADS,), (q, k, v, out, *strides, shape, words, anchors, broken))
