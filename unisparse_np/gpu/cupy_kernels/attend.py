"""Step 6 of ALGORITHM.md on the GPU: attend_sm90.cu on Hopper, attend_sm80.cu elsewhere; dense attention is the same kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np

from ...problem import KeySummary, Problem, ceil_div
from . import plain_stages
from .compress import find_anchors, gather_anchors
from .decode_attention import attend_few, splits_keys
from .device import capability, num_multiprocessors, tensor_map
from .plan import Plan, plan_of
from .select import BlockMask, from_bool
from .shapes import aligned, check_dtype, element_strides, uses_tensor_cores

L2_SECTION_BYTES = 32 << 20  # keys and values worked on at a time: they stay in the L2 of an A100, H100 or H200
HOPPER_HEAD_DIMS = (64, 128)
REPAIR_BLOCKS, REPAIR_THREADS = 64, 128
SCHEDULE_THREADS, SCHEDULE_BYTES = 1024, 4096
NULL = np.uint64(0)


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
    """Step 6 with the mask as words (None: dense) and the anchors as positions [Hkv, Nk, r] (None: no anchors).

    All launches are prepared before the first is made, so that the GPU never waits for the host between them.
    """
    problem = plan.problem
    if not uses_tensor_cores(problem, q.dtype):
        words, heads_per_row = (None, 1) if mask is None else (mask.words, mask.heads_per_row)
        return Attended(*plain_stages.attend(q, k, v, words, heads_per_row, anchors, plan))
    q, k, v = aligned(q), aligned(k), aligned(v)
    if splits_keys(problem, q.dtype):
        return Attended(*attend_few(q, k, v, mask, anchors, plan))
    with_anchors = anchors is not None and mask is not None
    keys = Keys(k, v, None if mask is None else mask.words)
    if with_anchors:
        anchors = cupy.ascontiguousarray(anchors)
        keys = Keys(k, v, keys.words, anchors, *gather_anchors(k, v, anchors, plan))
    shape = plan.shape(1 if mask is None else mask.heads_per_row, with_anchors)
    out = cupy.empty((problem.num_q_heads, problem.q_len, problem.head_dim), q.dtype)
    lse = cupy.empty(out.shape[:2], np.float32)
    items = Items(plan)
    on_hopper = capability() == (9, 0) and problem.head_dim in HOPPER_HEAD_DIMS
    prepare = _prepare_sm90 if on_hopper else _prepare_sm80
    launches = (
        _prepare_schedule(None if mask is None else mask.counts, shape, items, plan),
        prepare(q, keys, out, lse, shape, items, plan),
        _prepare_repair(q, keys, out, shape, items, plan),
    )
    for function, grid, block, arguments, shared in launches:
        function((grid,), (block,), tuple(NULL if x is None else x for x in arguments), shared_mem=shared)
    name = f"attend_{'sm90' if on_hopper else 'sm80'} d{problem.head_dim} S{problem.config.block_size}"
    return Attended(out, lse, f"{name} {'float16' if q.dtype == np.float16 else 'bfloat16'}")


class Keys(NamedTuple):
    """What the queries attend to: k, v [Hkv, Lk, d], the mask's words or None, anchor positions and the compact anchors or None."""

    k: Any
    v: Any
    words: Any = None
    anchors: Any = None
    anchor_keys: Any = None
    anchor_values: Any = None


class Items:
    """The attention kernel's work: one item a query head and tile of rows, and the counters, in one piece of memory.

    work {head, tile} x count, the kernel's item counter, then what repair.cu has to look at.
    """

    def __init__(self, plan: Plan) -> None:
        problem = plan.problem
        self.tile_rows = 64 if problem.config.block_size == 64 else 128
        self.count = problem.num_q_heads * ceil_div(problem.q_len, self.tile_rows)
        self.memory = cupy.empty(4 + 2 * self.count * (1 + self.tile_rows // 16), np.int32)
        self.work = np.uint64(self.memory.data.ptr)
        self.counter = np.uint64(int(self.work) + 8 * self.count)
        self.broken = np.uint64(int(self.counter) + 8)


Launch = tuple[Any, int, int, tuple[Any, ...], int]  # function, grid, threads, arguments, bytes of shared memory


def _prepare_schedule(counts: Any, shape: np.ndarray, items: Items, plan: Plan) -> Launch:
    """Orders the items, longest first within sections of heads whose keys and values fit the L2; clears the counters."""
    problem = plan.problem
    bytes_per_head = 4 * problem.k_len * problem.head_dim
    kv_heads = 1 << max(0, (L2_SECTION_BYTES // bytes_per_head).bit_length() - 1)
    heads = min(kv_heads, problem.num_kv_heads) * problem.group_size
    function = plan.kernel("schedule.cu", "schedule", SCHEDULE_BYTES)
    arguments = (shape, counts, items.work, np.int32(items.tile_rows), np.int32(heads), items.counter, items.broken)
    return function, ceil_div(problem.num_q_heads, heads), SCHEDULE_THREADS, arguments, SCHEDULE_BYTES


def _prepare_sm90(q: Any, keys: Keys, out: Any, lse: Any, shape: np.ndarray, items: Items, plan: Plan) -> Launch:
    problem, rows = plan.problem, items.tile_rows
    shared = shared_bytes_sm90(problem.head_dim, problem.config.block_size)
    function = plan.kernel("attend_sm90.cu", "attend_sm90", shared, q.dtype)
    maps = [tensor_map(q, rows), tensor_map(keys.k, rows), tensor_map(keys.v, rows), tensor_map(out, 64)]
    maps += maps[1:3] if keys.anchors is None else [tensor_map(keys.anchor_keys, rows), tensor_map(keys.anchor_values, rows)]
    per_multiprocessor = 1 if rows == 128 else 3 if problem.head_dim == 64 else 2
    arguments = (*maps, shape, items.work, np.int32(items.count), keys.words, keys.anchors, lse, items.counter, items.broken)
    return function, min(items.count, num_multiprocessors() * per_multiprocessor), 128 + 2 * rows, arguments, shared


def _prepare_sm80(q: Any, keys: Keys, out: Any, lse: Any, shape: np.ndarray, items: Items, plan: Plan) -> Launch:
    problem = plan.problem
    shared = shared_bytes_sm80(problem.head_dim, problem.config.block_size)
    function = plan.kernel("attend_sm80.cu", "attend_sm80", shared, q.dtype)
    strides = (*element_strides(q), *element_strides(keys.k), *element_strides(keys.v))
    inputs = (q, keys.k, keys.v, out, keys.anchor_keys, keys.anchor_values)
    arguments = (*inputs, *strides, shape, items.work, keys.words, keys.anchors, lse, items.broken)
    return function, items.count, threads_sm80(problem.head_dim, items.tile_rows), arguments, shared


def _prepare_repair(q: Any, keys: Keys, out: Any, shape: np.ndarray, items: Items, plan: Plan) -> Launch:
    function = plan.kernel("repair.cu", "repair", 0, q.dtype)
    strides = (*element_strides(q), *element_strides(keys.k), *element_strides(keys.v))
    arguments = (q, keys.k, keys.v, out, *strides, shape, keys.words, keys.anchors, items.broken)
    return function, REPAIR_BLOCKS, REPAIR_THREADS, arguments, 0


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
